"""PEFT 0.21 with transformers 5.24, which calls a cache otherwise, so that PEFT's prefix would be ignored in generate.

transformers 5.24 asks for PEFT 0.22 itself. Until that is there, PEFT reads and writes the arguments of a step by both
names here; what it computes is its own.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModelForCausalLM, PeftModelForSeq2SeqLM

from prefix_attn.bank.cache_argument import CACHE, OLD


class _Arguments(dict[str, Any]):
    """Arguments in which the cache's old name means the new one."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(CACHE if name == OLD else name)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(CACHE if name == OLD else name, value)

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(CACHE if name == OLD else name, default)


def teach_peft_the_new_name() -> None:
    """Wrap PEFT's preparation of a step; nothing to do where transformers is older."""
    if CACHE == OLD:
        return
    for kind in (PeftModelForCausalLM, PeftModelForSeq2SeqLM):
        kind.prepare_inputs_for_generation = _by_both_names(kind.prepare_inputs_for_generation)


def _by_both_names(prepare: Any) -> Any:
    def prepared(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        theirs = model.base_model_prepare_inputs_for_generation
        model.base_model_prepare_inputs_for_generation = lambda *a, **k: _Arguments(theirs(*a, **k))
        try:
            return dict(prepare(model, *args, **kwargs))
        finally:
            model.base_model_prepare_inputs_for_generation = theirs

    return prepared
