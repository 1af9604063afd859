"""Attention over [bank ; request], registered with transformers' AttentionInterface.

The decoder's hook passes a `Batch` down as a keyword. A model that loses it, asks for something the operation does not
do, or builds a mask of a kind we do not know is refused, so that a prefix is never dropped in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefix_attn.attention import prefix_attention
from prefix_attn.bank import PrefixBank
from prefix_attn.errors import UnsupportedModel
from prefix_attn.hf.masks import RequestMask
from prefix_attn.hf.packed import PackedRows
from prefix_attn.plan import BatchPlan
from prefix_attn.types import PrefixKV

#: Our name in transformers' registries. (It may contain neither "flash" nor "/": transformers reads meaning into both.)
NAME = "prefix_attn"

#: The keyword that carries a `Batch` from the decoder's hook to every attention layer.
KEYWORD = "prefix_batch"


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs to know: whose prefixes, or, without tasks, the implementation to leave it to."""

    implementation: str
    bank: PrefixBank | None = None
    task_ids: Tensor | None = None
    plan: BatchPlan | None = None
    packed: PackedRows | None = None  # in continuous batching


def prefix_attention_forward(
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
    batch: Batch | None = kwargs.pop(KEYWORD, None)
    layer = type(module).__name__
    if batch is None:
        raise UnsupportedModel(
            f"{layer}: the model does not pass keywords on to its attention layers, so the prefix "
            "cannot reach them; unpatch it and use PEFT's own inference"
        )
    if batch.bank is None or batch.task_ids is None:
        original = original_attention(module, batch.implementation)
        return original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    refuse_what_would_be_wrong(layer, dropout, kwargs)
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedModel(f"{layer}: only causal self-attention takes a prefix")
    if getattr(module, "layer_idx", None) is None:
        raise UnsupportedModel(f"{layer}: the layer does not know its index, so its prefix cannot be found")
    index: Any = module.layer_idx
    query, key, value, prefix, sinks = under_autocast(query, key, value, batch.bank.layer(index), kwargs.get("s_aux"))
    options: dict[str, Any] = {"scale": scaling, "softcap": kwargs.get("softcap"), "sinks": sinks}
    if batch.packed is not None:
        out = batch.packed.attend(module, query, key, value, prefix, kwargs, **options)
    else:
        mask = RequestMask.unpack(attention_mask, module, kwargs.get("sliding_window"))
        out = prefix_attention(  # type: ignore[assignment]
            query, key, value, prefix, batch.task_ids,
            kv_start=mask.kv_start, kv_len=mask.kv_len, window=mask.window, plan=batch.plan, **options,
        )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def under_autocast(
    query: Tensor, key: Tensor, value: Tensor, prefix: PrefixKV, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, PrefixKV, Tensor | None]:
    """The same; inside autocast in its lower precision, as PyTorch's own attention does."""
    if not torch.is_autocast_enabled(query.device.type):
        return query, key, value, prefix, sinks
    dtype = torch.get_autocast_dtype(query.device.type)
    prefix = replace(prefix, k=prefix.k.to(dtype), v=prefix.v.to(dtype))
    return query.to(dtype), key.to(dtype), value.to(dtype), prefix, sinks if sinks is None else sinks.to(dtype)


def original_attention(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function the model would use unpatched."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function


def refuse_what_would_be_wrong(layer: str, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise `UnsupportedModel` for what the fused operation cannot give."""
    if dropout:
        raise UnsupportedModel(
            f"{layer}: attention dropout {dropout} cannot be applied inside the fused operation; "
            "call model.eval(), or set the config's attention dropout to 0 before training"
        )
    if kwargs.get("output_attentions"):
        raise UnsupportedModel(f"{layer}: attention weights are never built; drop output_attentions=True, or unpatch")
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModel(f"{layer}: a position bias has no counterpart for prefix tokens")
