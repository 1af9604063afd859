"""Attention over [bank ; own keys] in an encoder-decoder model: which part a layer is, its keys, and its bias.

Encoder and cross-attention see all keys of the encoder's input that are not padding. Their mask is an int32 tensor
``[batch, 1, 2, 1]`` holding ``(kv_start, kv_len)`` per row; the decoder's self-attention has the mask of masks.py, of
another shape, so that neither can be taken for the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function

from prefix_attn.attention import prefix_attention
from prefix_attn.bank import PrefixBank
from prefix_attn.bank.geometry import CROSS, DECODER
from prefix_attn.errors import UnsupportedModel
from prefix_attn.hf.attention import KEYWORD, original_attention, refuse_unfused, under_autocast
from prefix_attn.hf.masks import RequestMask, request_mask, row_spans
from prefix_attn.hf.scope import scope
from prefix_attn.plan import BatchPlan

#: Our name in transformers' registries.
PARTS_IMPLEMENTATION = "prefix_attn_parts"

#: The attribute of an attention module that holds its `Place`.
PLACE = "_prefix_attn_place"


@dataclass(frozen=True)
class Place:
    """Where an attention module stands in its model.

    Attributes:
        part, layer: whose prefixes it reads.
        bias: the module that holds the part's table of relative biases (T5), or None.
    """

    part: str
    layer: int
    bias: nn.Module | None = None


@dataclass(frozen=True)
class PartBatch:
    """What one pass through the encoder or the decoder needs to know; without a bank, whom to leave it to.

    Attributes:
        plans: for the layers of each part and device, with the task ids there.
        biases: for each module that holds relative biases, their table on each device. Made before the layers run: made
            in a layer that is checkpointed, it would not be made again when the layer is.
    """

    implementation: str
    bank: PrefixBank | None = None
    task_ids: Tensor | None = None
    plans: Mapping[str, Mapping[torch.device, BatchPlan]] = field(default_factory=dict)
    biases: Mapping[nn.Module, Mapping[torch.device, Tensor]] = field(default_factory=dict)


def part_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """One layer's attention as transformers calls it: ``[batch, heads, len, D]`` to ``[batch, len, heads, D]``."""
    batch: PartBatch = kwargs.pop(KEYWORD)
    if batch.bank is None or batch.task_ids is None:
        original = original_attention(module, batch.implementation)
        return original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    place: Place = getattr(module, PLACE)
    layer = type(module).__name__
    # T5 hands cross-attention, which has no table, a bias of zeros.
    if kwargs.pop("position_bias", None) is not None and place.bias is None and place.part != CROSS:
        raise UnsupportedModel(f"{layer}: a position bias from an unknown source has no counterpart for prefix tokens")
    refuse_unfused(layer, dropout, kwargs)
    start: Tensor | None
    end: Tensor | None
    if place.part == DECODER:
        mask = RequestMask.unpack(attention_mask, module, kwargs.get("sliding_window"))
        start, end = mask.kv_start, mask.kv_len
    else:
        start, end = _unpack(layer, attention_mask)
    query, key, value, prefix, _ = under_autocast(query, key, value, batch.bank.layer(place.layer, place.part))
    bias = None if place.bias is None else batch.biases[place.bias][query.device]
    plan = batch.plans[place.part][query.device]
    out = prefix_attention(
        query, key, value, prefix, plan.task_ids, kv_start=start, kv_len=end, causal=place.part == DECODER,
        scale=scaling, relative_bias=bias, plan=plan,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _unpack(layer: str, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """First valid key and one past the last, ``[batch]`` each; a model that passes no mask lets all keys be seen."""
    if mask is None:
        return None, None
    if mask.dtype != torch.int32 or mask.ndim != 4 or mask.shape[1:] != (1, 2, 1):
        raise UnsupportedModel(
            f"{layer}: attention_mask: expected the mask prefix_attn builds, got {mask.dtype} {list(mask.shape)}; pass "
            "a 2D padding mask (1 = token, 0 = padding)"
        )
    start, end = mask.flatten(1).unbind(1)
    return start, end


def part_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Build the mask for AttentionMaskInterface; without tasks, and for the decoder's self-attention, masks.py does."""
    if scope().implementation is not None or mask_function is not bidirectional_mask_function:
        return request_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
            attention_mask=attention_mask, device=device, **kwargs,
        )  # fmt: skip
    if attention_mask is None:
        start = torch.zeros(batch_size, dtype=torch.int32, device=device)
        end = torch.full_like(start, kv_length)
    else:
        start, end = row_spans(attention_mask[:, :kv_length].to(device), may_wait=q_length > 1)
    return torch.stack([start, end], dim=1).int()[:, None, :, None]
