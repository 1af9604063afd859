"""Draft models of assisted decoding: what an assistant proposes, the patched model checks token by token.

So nothing an assistant does can make the result wrong; it only has to be spoken to in terms it understands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prefix_attn.hf.wiring import bank_of


class Assistant:
    """An assistant model as transformers uses it, whose ``generate`` gets the tasks by its own names.

    A patched assistant uses its own bank's prefix of the same name, where there is one; any other runs without.
    """

    def __init__(self, model: Any, names: Sequence[str | None]) -> None:
        self._model = model
        bank = bank_of(model)
        self._tasks = None if bank is None else [name if name is not None and name in bank else None for name in names]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # transformers looks at its name to choose how to draft
        return type(self._model)

    def generate(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """``model.generate`` with the assistant's own tasks in the place of the caller's."""
        if self._tasks is None:
            return self._model.generate(*args, **kwargs)
        tokens = kwargs.get("input_ids")
        if tokens is not None and kwargs.get("attention_mask") is None and not self._model.config.is_encoder_decoder:
            # transformers leaves out a mask of ones, and would take pad tokens that were drafted for padding
            kwargs["attention_mask"] = torch.ones_like(tokens)
        return self._model.generate(*args, task_ids=self._tasks, **kwargs)
