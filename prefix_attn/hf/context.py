"""Whether prompt, prefix and new tokens fit into the positions a model has, known before any work is done.

What is too long is refused, or on request loses its oldest tokens: they become padding, so that the batch keeps its
shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.cache_argument import CACHE, cache_among
from prefix_attn.context import room_for_new
from prefix_attn.errors import PaddingInWindow, RepeatedBOS, ShapeError
from prefix_attn.hf.positions import overflow

#: New tokens of ``generate`` where nobody says how many (transformers' default).
DEFAULT_NEW_TOKENS = 20


def option(name: str, options: dict[str, Any], configs: Sequence[Any]) -> Any:
    """An option of ``generate``: its keyword (also None), else what the first config that says so says."""
    return options.get(name, next((x for c in configs if (x := getattr(c, name, None)) is not None), None))


def new_tokens(inputs: Tensor, options: dict[str, Any], configs: Sequence[Any]) -> int:
    """Tokens that ``generate`` may add."""
    new, length = (option(name, options, configs) for name in ("max_new_tokens", "max_length"))
    if new is None and length is not None:
        new = max(length - inputs.shape[1], 1)
    return DEFAULT_NEW_TOKENS if new is None else int(new)


def check_fits(bank: PrefixBank, task_ids: Tensor, inputs: Tensor, mask: Any, new: int) -> None:
    """Raise `ContextOverflow` for a row whose prefix leaves too little room.

    Args:
        inputs: ``[batch, tokens, ...]``.
        mask: its padding mask ``[batch, tokens]``, or None.
        new: tokens to be generated.
    """
    limit = bank.context_limit
    if limit is None or new <= room_for_new(limit, max(bank.lengths, default=0), inputs.shape[1]):
        return  # known without reading the device
    lengths = mask.sum(dim=1).tolist() if _is_padding_mask(mask) else [inputs.shape[1]] * len(inputs)
    for row, (task, tokens) in enumerate(zip(task_ids.tolist(), lengths, strict=True)):
        m = bank.lengths[task] if task >= 0 else 0
        if m and new > room_for_new(limit, m, tokens):
            shorten = "shorten the prompt (or let generate's truncation=True drop its oldest tokens)"
            raise overflow(row, m, tokens + new - 1, limit, shorten)


def warn_of_padding(bank: PrefixBank, task_ids: Tensor, inputs: Tensor, mask: Any, new: int) -> None:
    """Warn where a row's padding pushes its prefix out of sliding windows, which count slots of the cache (as in PEFT).

    Args: those of `check_fits`.
    """
    window, last = bank.sliding_window, inputs.shape[1] + new - 2  # the slot of the last query
    if window is None or not _is_padding_mask(mask) or max(bank.lengths, default=0) + last < window.tokens:
        return  # known without reading the device
    for row, (task, padding) in enumerate(zip(task_ids.tolist(), mask.long().argmax(dim=1).tolist(), strict=True)):
        if task >= 0 and padding and bank.lengths[task] and bank.lengths[task] + last >= window.tokens:
            warnings.warn(
                f"row {row}: its {padding} tokens of padding count in sliding windows of {window.tokens} tokens, so "
                "that it sees less of its prefix than alone; put prompts of one length into a batch, or call "
                "model.generate_batch, which needs no padding",
                PaddingInWindow,
                stacklevel=4,
            )
            return


def warn_of_second_bos(bank: PrefixBank, task_ids: Tensor, inputs: Tensor, mask: Any, bos: Any) -> None:
    """Warn where a prompt begins with the BOS token after a prefix that is a text.

    Args: those of `check_fits`; bos: the model's token, None where it has none.
    """
    if not isinstance(bos, int) or inputs.ndim != 2 or inputs.is_floating_point() or not inputs.shape[1]:
        return
    texts = bank.named("text")
    if not texts:
        return  # known without reading the device
    first = torch.zeros_like(inputs[:, 0], dtype=torch.int64)
    if _is_padding_mask(mask) and mask.shape == inputs.shape:
        first = mask.to(inputs.device).long().argmax(dim=1)
    opened = inputs.gather(1, first[:, None])[:, 0] == bos
    for row, (task, twice) in enumerate(zip(task_ids.tolist(), opened.tolist(), strict=True)):
        if twice and task in texts:
            warnings.warn(
                f"row {row}: its prompt begins with the BOS token, after the text of {texts[task]!r}; tokenise the "
                "prompts of such tasks with add_special_tokens=False",
                RepeatedBOS,
                stacklevel=4,
            )
            return


def truncated(bank: PrefixBank, task_ids: Tensor, options: dict[str, Any], new: int) -> Tensor:
    """The padding mask ``[batch, tokens]`` without each row's oldest tokens, as many as must go.

    Raises:
        ShapeError: no padding mask, which would say what is a token; or a cache that already holds tokens.
        ContextOverflow: the new tokens alone leave no room for a prompt.
    """
    mask, limit = options.get("attention_mask"), bank.context_limit
    if not _is_padding_mask(mask):
        raise ShapeError("attention_mask: truncation expects the tokenizer's mask [batch, tokens], got none; pass it")
    if cache_among(options) is not None:
        raise ShapeError(
            f"truncation: expected a conversation that starts here, got {CACHE}; tokens in a cache cannot be "
            "dropped: start a new cache with a shorter conversation"
        )
    assert isinstance(mask, Tensor)
    if limit is None:
        return mask
    lengths = [bank.lengths[task] if task >= 0 else 0 for task in task_ids.tolist()]
    prompts = [room_for_new(limit, m, new) for m in lengths]
    for row, (m, longest) in enumerate(zip(lengths, prompts, strict=True)):
        if longest < 1:
            raise overflow(row, m, new, limit)
    tokens_from_here = mask.flip(1).cumsum(1).flip(1)
    return mask * (tokens_from_here <= torch.tensor(prompts, device=mask.device)[:, None])


def _is_padding_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2
