"""What ``model.generate`` needs: task ids as a tensor (so that beams and return sequences copy them), checked up front.

Both objects below stand in front of a bound method as an attribute of the model instance. They are plain objects, so
that a patched model can be copied and pickled.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from prefix_attn.bank import PrefixBank
from prefix_attn.errors import ShapeError
from prefix_attn.hf.masks import scope
from prefix_attn.hf.positions import overflow


class _Method:
    """A method of the model's class, called on the instance it was attached to, with ``task_ids`` in its signature."""

    name: str

    def __init__(self, model: Any) -> None:
        self.model = model
        method = getattr(type(model), self.name)
        self.__doc__ = method.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(getattr(type(self.model), self.name))
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "task_ids")]
        ours = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
        last = parameters[-1:] if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        return signature.replace(parameters=[*parameters[: len(parameters) - len(last)], ours, *last])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


class Generate(_Method):
    """``model.generate`` that takes ``task_ids``: one name, id or None per row."""

    name = "generate"

    def __init__(self, model: Any, bank: PrefixBank) -> None:
        super().__init__(model)
        self.bank = bank

    def __call__(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        if task_ids is None:
            return self.original(*args, **kwargs)
        ids = self.bank.task_ids(task_ids)
        inputs = args[0] if args else kwargs.get("inputs")
        for name in ("input_ids", "inputs_embeds"):
            inputs = kwargs.get(name) if inputs is None else inputs
        if inputs is not None:
            if len(ids) != len(inputs):
                raise wrong_count(len(ids), len(inputs))
            self._check_context(ids, inputs, kwargs)
        return self.original(*args, task_ids=ids, **kwargs)

    def _check_context(self, ids: Tensor, inputs: Tensor, kwargs: dict[str, Any]) -> None:
        """Refuse before any work a row whose prefix leaves too little room for what is asked."""
        limit = self.bank.context_limit
        if limit is None:
            return
        config = kwargs.get("generation_config") or self.model.generation_config
        new = kwargs.get("max_new_tokens") or config.max_new_tokens
        total = kwargs.get("max_length") or config.max_length
        if new is None:
            new = max(total - inputs.shape[1], 1) if total is not None else 1
        mask = kwargs.get("attention_mask")
        tokens = [inputs.shape[1]] * len(inputs)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            tokens = mask.sum(dim=1).tolist()
        for row, (task, n) in enumerate(zip(ids.tolist(), tokens, strict=True)):
            m = self.bank.lengths[task] if task >= 0 else 0
            if m and m + n + new - 1 > limit:  # the last new token is not fed back
                raise overflow(row, m, n + new - 1, limit)


class PrepareInputs(_Method):
    """``prepare_inputs_for_generation`` with ``task_ids``: transformers reads its signature to accept the name."""

    name = "prepare_inputs_for_generation"

    def __init__(self, model: Any, implementation: str) -> None:
        super().__init__(model)
        self.implementation = implementation

    def __call__(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        scope.implementation = self.implementation if task_ids is None else None  # static caches build masks here
        inputs: dict[str, Any] = self.original(*args, **kwargs)
        return inputs if task_ids is None else inputs | {"task_ids": task_ids}


def wrong_count(got: int, rows: int) -> ShapeError:
    """The error for a list of tasks that does not match the batch."""
    return ShapeError(f"task_ids: expected one task per row, {rows} in all (None for a row without prefix), got {got}")


def checked_for_batch(bank: PrefixBank, task_ids: Any, rows: int) -> Tensor:
    """Task ids of a forward call as an int32 tensor ``[rows]``."""
    ids = bank.task_ids(task_ids)
    if ids.shape != torch.Size([rows]):
        raise wrong_count(len(ids), rows)
    return ids
