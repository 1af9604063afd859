"""Attention over [bank ; request], registered with transformers' AttentionInterface.

The model's hook passes a `Batch` down as a keyword, or, where a model loses keywords, through the thread's scope. A
model that asks for something the operation does not do, or builds a mask of a kind we do not know, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefix_attn.attention import prefix_attention
from prefix_attn.bank import PrefixBank
from prefix_attn.errors import UnsupportedModel
from prefix_attn.hf.masks import RequestMask
from prefix_attn.hf.packed import PackedRows
from prefix_attn.hf.scope import scope
from prefix_attn.hf.sources import SOURCES, Call, Source, widened
from prefix_attn.plan import BatchPlan
from prefix_attn.types import PrefixKV

#: Our name in transformers' registries. (It may contain neither "flash" nor "/": transformers reads meaning into both.)
IMPLEMENTATION = "prefix_attn"

#: The keyword that carries a `Batch` from the model's hook to every attention layer.
KEYWORD = "prefix_batch"

#: Keywords of attention calls that say nothing about which keys a query sees or how they count, or that are dealt with
#: here. A family that passes any other is not patched: it may be a bias or a mask that a prefix has no share in. (Those
#: that only a caller's pass has are his own: transformers hands them all on.)
KNOWN = {
    "sliding_window", "softcap", "s_aux", "is_causal", "output_attentions", "position_ids",
    "position_embeddings", "cache_position", "use_cache", "output_hidden_states", "output_router_logits",
    "return_dict", "logits_to_keep", "num_items_in_batch", "layer_idx",
}  # fmt: skip


class Ambiguous(UnsupportedModel):
    """The family itself gives a prefix no definite meaning, so no way of serving it can be exact."""


class KeywordsLost(UnsupportedModel):
    """A model does not pass keywords on to its attention layers; the patch then leaves the batch in the scope."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs to know: whose prefixes, or, without tasks, the implementation to leave it to.

    Attributes:
        plans: for the layers of each device, with the task ids there.
        layer: gives the bank's layers, as they are in this pass.
        derived: prefixes that the model makes of the bank's, see `Sources`.
        strict: refuse keywords of attention calls that are not known.
        recorded: where to note the calls of a pass without tasks, if anywhere.
        seen: calls so far of modules that have several in a pass.
    """

    implementation: str
    bank: PrefixBank | None = None
    task_ids: Tensor | None = None
    plans: Mapping[torch.device, BatchPlan] = field(default_factory=dict)
    layer: Callable[[int], PrefixKV] | None = None
    packed: PackedRows | None = None  # in continuous batching
    derived: tuple[PrefixKV, ...] = ()
    strict: bool = False
    recorded: list[Call] | None = None
    seen: dict[int, int] = field(default_factory=dict)

    def prefix(self, module: nn.Module, mask: RequestMask | None) -> PrefixKV:
        """What the module's present call reads."""
        assert self.layer is not None
        sources: tuple[Source, ...] | None = getattr(module, SOURCES, None)
        if sources is None:
            raise UnsupportedModel(
                f"{type(module).__name__}: this attention layer was not seen when the model was patched"
            )
        source = sources[0]
        if len(sources) > 1:
            count = self.seen.get(id(module), 0)
            self.seen[id(module)] = count + 1
            source = sources[count % len(sources)]
            if count >= len(sources) and source.apart:
                raise UnsupportedModel(
                    f"{type(module).__name__}: gradient checkpointing calls this family's layers again in an order "
                    "that does not tell which prefix they read; turn it off"
                )
        if source.slides and mask is not None and mask.window is None:
            raise Ambiguous(
                f"{type(module).__name__}: the layer's cache forgets what its mask would show, so what a query sees of "
                "a prefix would depend on how the tokens were cut into passes"
            )
        return self.derived[source.layer] if source.derived else self.layer(source.layer)


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
    batch: Batch | None = kwargs.pop(KEYWORD, None) or scope().batch
    layer = type(module).__name__
    if batch is None:
        raise KeywordsLost(
            f"{layer}: the attention layer was called outside a pass of the patched model; for a model that was made "
            "from a patched one's config, call set_attn_implementation('sdpa') on it"
        )
    if batch.bank is None or batch.task_ids is None:
        if batch.recorded is not None:
            _refuse_masks_of_heads(layer, attention_mask)
            batch.recorded.append(Call(module, key, value))
        original = original_attention(module, batch.implementation)
        return original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    refuse_unfused(layer, dropout, kwargs)
    if kwargs.get("is_causal") is False:
        raise UnsupportedModel(f"{layer}: only causal self-attention takes a prefix")
    unknown = sorted(name for name, x in kwargs.items() if name not in KNOWN and x is not None)
    if unknown and batch.strict:
        raise UnsupportedModel(
            f"{layer}: passes {', '.join(unknown)} to its attention, whose meaning for prefix tokens is not known"
        )
    mask = None if batch.packed else RequestMask.unpack(attention_mask, module, kwargs.get("sliding_window"))
    query, key, value, prefix, sinks = under_autocast(
        query, key, value, batch.prefix(module, mask), kwargs.get("s_aux")
    )
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {"scale": scale, "softcap": kwargs.get("softcap"), "sinks": sinks}
    if batch.packed is not None:
        out = batch.packed.attend(module, query, key, value, prefix, kwargs, **options)
    else:
        assert mask is not None
        v_head_dim = value.shape[3]
        width = max(query.shape[3], v_head_dim)
        plan = batch.plans[query.device]
        attended = prefix_attention(
            widened(query, width), widened(key, width), widened(value, width), prefix, plan.task_ids,
            kv_start=mask.kv_start, kv_len=mask.kv_len, window=mask.window, plan=plan, **options,
        )  # fmt: skip
        out = attended[..., :v_head_dim]
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
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)  # a subclass may be in a user's own
    eager = next(filter(None, (getattr(file, "eager_attention_forward", None) for file in files)), None)
    function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function


def _refuse_masks_of_heads(layer: str, mask: Any) -> None:
    """For the family's own mask ``[batch, heads or 1, q_len, kv_len]``; flex_attention's is no tensor."""
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] != 1:
        raise UnsupportedModel(
            f"{layer}: makes a mask for each head out of the keys and values in its cache, and a prefix is not there"
        )


def refuse_unfused(layer: str, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise `UnsupportedModel` for what the fused operation cannot give."""
    if dropout:
        raise UnsupportedModel(
            f"{layer}: attention dropout {dropout} cannot be applied inside the fused operation; "
            "call model.eval(), or load the model without it (from_pretrained(..., attention_dropout=0.0), or what its "
            "config calls it)"
        )
    if kwargs.get("output_attentions"):
        raise UnsupportedModel(f"{layer}: attention weights are never built; drop output_attentions=True, or unpatch")
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModel(
            f"{layer}: adds a bias of its own to the scores of the tokens in its cache, and a prefix is not there"
        )
