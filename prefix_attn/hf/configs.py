"""A patched model's own copies of its config objects, so that models which share a config are not touched."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig


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

    def restore(self, model: Any) -> None:
        """Give every module back the config it had."""
        for name, module in model.named_modules():
            if name in self._before:
                module.config = self._before[name]
