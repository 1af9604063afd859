"""Positions: the row's own token i stands at ``m + i``, behind its prefix of m tokens (PEFT's rule)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefix_attn.bank import PrefixBank
from prefix_attn.errors import ContextOverflow, UnsupportedModel
from prefix_attn.plan import recording

#: Families that count positions by the attention mask when none are given; all others count cache slots.
COUNTED_BY_MASK = ("opt",)


def prefix_lengths(bank: PrefixBank, task_ids: Tensor) -> Tensor:
    """Prefix tokens of each row, int ``[batch]`` on the device; 0 for a row without task."""
    if not len(bank.lens):
        return torch.zeros_like(task_ids)
    return torch.where(task_ids >= 0, bank.lens[task_ids.clamp(min=0).long()], 0)


def shifted_positions(
    bank: PrefixBank,
    task_ids: Tensor,
    inputs: Tensor,
    position_ids: Tensor | None,
    attention_mask: Any,
    cache: Any,
    model_type: str,
) -> Tensor:
    """Position ids ``[batch, q_len]`` with each row's prefix counted in; inputs: ``[batch, q_len, ...]``.

    Raises:
        ContextOverflow: a row's prefix pushes it past the positions the model has.
        UnsupportedModel: position ids of a kind that does not say where a prefix stands.
    """
    q_len = inputs.shape[1]
    past = cache.get_seq_length() if cache is not None else 0
    if isinstance(past, Tensor):
        past = past.clone()  # a static cache returns its live counter
    if position_ids is None:
        position_ids = _default_positions(q_len, past, inputs, attention_mask, model_type)
    if position_ids.ndim != 2:
        raise UnsupportedModel(
            f"position_ids: expected [batch, q_len], got {list(position_ids.shape)}; positions with "
            "several axes do not say where a prefix stands"
        )
    m = prefix_lengths(bank, task_ids).to(position_ids.device)
    shifted = position_ids + m[:, None]
    _check_context(bank, shifted, m, past, q_len)
    return shifted


def _default_positions(q_len: int, past: Any, inputs: Tensor, attention_mask: Any, model_type: str) -> Tensor:
    if model_type in COUNTED_BY_MASK and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        counted = (attention_mask.cumsum(dim=1) * attention_mask - 1).long()
        return counted[:, -q_len:]
    positions: Tensor = torch.arange(q_len, device=inputs.device) + past
    return positions[None]


def _check_context(bank: PrefixBank, positions: Tensor, m: Tensor, past: Any, q_len: int) -> None:
    limit = bank.context_limit
    if limit is None or recording(positions):
        return
    if isinstance(past, int) and past + q_len + max(bank.lengths, default=0) <= limit:
        return  # fits whatever the tasks are: known without reading the device
    last = torch.where(m > 0, positions.amax(dim=1), 0).tolist()
    for row, position in enumerate(last):
        if position >= limit:
            raise overflow(row, int(m[row]), position + 1 - int(m[row]), limit)


def overflow(row: int, m: int, tokens: int, limit: int) -> ContextOverflow:
    """The error for a row that needs more positions than there are."""
    return ContextOverflow(
        f"row {row}: a prefix of {m} tokens and {tokens} of its own need {m + tokens} positions, but the model has "
        f"{limit}; shorten the prompt, lower max_new_tokens, or use a shorter prefix"
    )
