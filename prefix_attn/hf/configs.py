"""A patched model's own copies of its config objects, so that models which share a config are not touched."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from prefix_attn.errors import UnsupportedModel

#: What all our names in transformers' registries begin with.
OURS = "prefix_attn"


class OwnConfigs:
    """Gives every module of a model its own config, and remembers the one it had."""

    def __init__(self, model: Any) -> None:
        copies: dict[int, Any] = {}  # shared by all deepcopies, so that nested configs stay the same objects
        self._before: dict[str, PreTrainedConfig] = {}
        self.implementation: str = model.config._attn_implementation
        for name, module in model.named_modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                self._before[name] = module.config
                module.config = copy.deepcopy(module.config, copies)

    def select(self, modules: Iterable[Any], implementation: str) -> None:
        """Let the modules use an attention implementation."""
        for module in modules:
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config._attn_implementation_internal = implementation

    def leave_others(self, model: Any, ours: Iterable[Any]) -> None:
        """Undo `select` for modules that have no config of ``ours``: stacks that read images or sound."""
        configs = {id(module.config) for module in ours if hasattr(module, "config")}
        for name, module in model.named_modules():
            if name in self._before and id(module.config) not in configs:
                module.config._attn_implementation_internal = self._before[name]._attn_implementation

    def restore(self, model: Any) -> None:
        """Give every module back the config it had; where somebody has changed one meanwhile, they keep the copies."""
        modules = {name: module for name, module in model.named_modules() if name in self._before}
        for name, module in modules.items():
            if (module.config._attn_implementation or "").startswith(OURS):
                module.config._attn_implementation_internal = self._before[name]._attn_implementation
        if all(_equal(module.config, self._before[name]) for name, module in modules.items()):
            for name, module in modules.items():
                module.config = self._before[name]


def _equal(a: PreTrainedConfig, b: PreTrainedConfig) -> bool:
    return bool(a._attn_implementation == b._attn_implementation and a.to_dict() == b.to_dict())


def check_config(stack: Any) -> None:
    """Raise `UnsupportedModel` for a stack of layers whose config no longer asks for our attention."""
    config = stack.config
    if not (config._attn_implementation or "").startswith(OURS):
        raise UnsupportedModel(
            f"task_ids: the model was switched to attn_implementation={config._attn_implementation!r} after it was "
            "patched, which has no prefixes; call prefix_attn.patch(model, bank) again"
        )
    if getattr(config, "output_attentions", False):
        raise UnsupportedModel(
            "output_attentions: attention weights are never built; set the config's to False, or unpatch the model"
        )
