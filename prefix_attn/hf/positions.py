"""Positions: the row's own token i stands at ``m + i``, behind its prefix of m tokens (PEFT's rule).

Most decoders take ``position_ids``, and get them shifted. Those that count for themselves (BART and its kin) look
positions up in a table, ``embed_positions``; there hooks put each row's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.forward import counting_tokens
from prefix_attn.errors import ContextOverflow, UnsupportedModel
from prefix_attn.hf.scope import scope
from prefix_attn.hf.wiring import parameters_of
from prefix_attn.plan import recording

#: Families that count positions by the attention mask when none are given; all others count cache slots.
COUNTED_BY_MASK = ("opt",)


def prefix_lengths(lens: Tensor, task_ids: Tensor) -> Tensor:
    """Prefix tokens of each row, int ``[batch]`` on the device, by a bank's ``lens``; 0 for a row without task."""
    if not len(lens):
        return torch.zeros_like(task_ids)
    return torch.where(task_ids >= 0, lens[task_ids.clamp(min=0).long()], 0)


def shifted_positions(
    bank: PrefixBank,
    task_ids: Tensor,
    inputs: Tensor,
    position_ids: Tensor | None,
    attention_mask: Any,
    cache: Any,
    decoder: nn.Module,
) -> Tensor:
    """Position ids ``[batch, q_len]`` with each row's prefix counted in; inputs: ``[batch, q_len, ...]``.

    Positions with several axes, ``[axes, batch, q_len]``, are shifted on each: text moves along all of them alike.

    Raises:
        ContextOverflow: a row's prefix pushes it past the positions the model has.
        UnsupportedModel: position ids of a kind that does not say where a prefix stands.
    """
    q_len = inputs.shape[1]
    past = cache.get_seq_length() if cache is not None else 0
    if isinstance(past, Tensor):
        past = past.clone()  # a static cache returns its live counter
    from_slots = position_ids is not None or counting_tokens(decoder) is None
    if position_ids is None:
        position_ids = _default_positions(q_len, past, inputs, attention_mask, decoder)
    if position_ids.ndim not in (2, 3):
        raise UnsupportedModel(
            f"position_ids: expected [batch, q_len] or [axes, batch, q_len], got {list(position_ids.shape)}"
        )
    m = prefix_lengths(bank.lens, task_ids).to(position_ids.device)
    shifted = position_ids + m[:, None]
    limit = bank.context_limit
    if limit is None or recording(shifted):
        return shifted
    if from_slots and isinstance(past, int) and past + q_len + max(bank.lengths, default=0) <= limit:
        return shifted  # fits whatever the tasks are: known without reading the device
    if isinstance(past, int) and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        padding = attention_mask[:, past : past + q_len].to(shifted.device) == 0
        if padding.shape == shifted.shape[-2:]:  # whatever it is, but a table of positions may end here
            shifted = torch.where(padding, shifted.clamp(max=limit - 1), shifted)
    _check_context(shifted if shifted.ndim == 2 else shifted.amax(dim=0), m, limit)
    return shifted


def counts_otherwise(model: nn.Module) -> bool:
    """Whether a family, given no positions, counts something else than slots of the cache."""
    config: Any = model.config
    return config.model_type in COUNTED_BY_MASK or counting_tokens(model) is not None


def _default_positions(q_len: int, past: Any, inputs: Tensor, attention_mask: Any, decoder: nn.Module) -> Tensor:
    from_ids = counting_tokens(decoder)
    if from_ids is not None:
        padding: Any = from_ids.padding_idx
        theirs: Any = from_ids
        if inputs.is_floating_point():
            count = theirs.create_position_ids_from_inputs_embeds
            counted = count(inputs, past, padding) if len(signature(count).parameters) == 3 else count(inputs, padding)
        else:
            counted = theirs.create_position_ids_from_input_ids(inputs, padding, past)
        assert isinstance(counted, Tensor)
        return counted
    config: Any = decoder.config
    if config.model_type in COUNTED_BY_MASK and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        counted = (attention_mask.cumsum(dim=1) * attention_mask - 1).long()
        return counted[:, -q_len:]
    positions: Tensor = torch.arange(q_len, device=inputs.device) + past
    return positions[None]


def _check_context(positions: Tensor, m: Tensor, limit: int) -> None:
    last = torch.where(m > 0, positions.amax(dim=1), 0).tolist()
    for row, position in enumerate(last):
        if position >= limit:
            raise overflow(row, int(m[row]), position + 1 - int(m[row]), limit)


def overflow(row: int, m: int, tokens: int, limit: int, shorten: str = "shorten the prompt") -> ContextOverflow:
    """The error for a row that needs more positions than there are."""
    return ContextOverflow(
        f"row {row}: a prefix of {m} tokens and {tokens} of its own need {m + tokens} positions, but the model has "
        f"{limit}; {shorten}, lower max_new_tokens, or use a shorter prefix"
    )


def tables_of_positions(decoder: Any) -> list[Any]:
    """The modules that embed positions in a decoder that takes none itself.

    Raises:
        UnsupportedModel: they take none either.
    """
    if takes_positions(decoder):
        return []
    tables = [module for name, module in decoder.named_modules() if name.rpartition(".")[2] == "embed_positions"]
    if not all(map(takes_positions, tables)):
        raise UnsupportedModel(
            f"{type(decoder).__name__}: it counts positions by itself, and rows with prefixes of different lengths "
            "need their own"
        )
    return tables


def takes_positions(module: Any) -> bool:
    """Whether positions can be given to a module."""
    return "position_ids" in parameters_of(module)


def hook_tables(tables: Iterable[Any]) -> list[RemovableHandle]:
    """Let modules that embed positions look up ``scope().positions``, every row's own, where a pass has set them."""
    return [
        handle
        for table in tables
        for handle in (
            table.register_forward_pre_hook(_look_up_rows, with_kwargs=True),
            table.register_forward_hook(_restore_rows),
        )
    ]


def _look_up_rows(
    table: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a module that embeds positions and takes one list of them: give it those of all rows."""
    positions = scope().positions
    return None if positions is None else (args, kwargs | {"position_ids": positions.reshape(-1)})


def _restore_rows(table: Any, args: tuple[Any, ...], embeddings: Tensor) -> Tensor | None:
    """Hook behind it: from a list of embeddings to ``[batch, q_len, hidden]``."""
    positions = scope().positions
    return None if positions is None else embeddings.reshape(*positions.shape, -1)


def turn_rows(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Pre-hook of RoFormer's layers: what was looked up, their third argument, from ``[1, 1, batch, q_len, dim]`` to
    ``[batch, 1, q_len, dim]``."""
    return None if scope().positions is None else (*args[:2], args[2][0, 0][:, None], *args[3:])
