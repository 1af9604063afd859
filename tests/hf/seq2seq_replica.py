"""One row of an encoder-decoder model with its prefix copied in front of every layer's keys, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

Parts = dict[str, list[tuple[Tensor, Tensor]]]

PART_OF = {"encoder.self_attn": "encoder", "encoder.SelfAttention": "encoder", "decoder.self_attn": "decoder",
           "decoder.SelfAttention": "decoder", "encoder_attn": "cross", "EncDecAttention": "cross"}  # fmt: skip


def replica_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float = 1.0, **kwargs: Any
) -> tuple[Tensor, None]:
    """softmax(scale * q @ [pk; k]^T + bias + mask) @ [pv; v], for a batch of copies of one row."""
    pk, pv = (x[None].expand(len(q), -1, -1, -1) for x in module.replica_prefix)
    m, n = pk.shape[2], k.shape[2]
    k, v = torch.cat([pk, k], dim=2), torch.cat([pv, v], dim=2)
    scores = scaling * q @ k.transpose(2, 3)
    if module.replica_bias is not None:
        scores = scores + module.replica_bias.compute_bias(m + n, m + n)[:, :, -q.shape[2] :]
    if mask is not None:
        scores = scores + torch.cat([mask.new_zeros(*mask.shape[:3], m), mask], dim=3)
    return (scores.softmax(dim=3) @ v).transpose(1, 2), None


@contextmanager
def replicated(model: Any, parts: Parts) -> Iterator[Any]:
    """The unpatched model with a prefix: lists over layers for "decoder", "encoder" and "cross", each optional."""
    AttentionInterface.register("replica", replica_attention)
    AttentionMaskInterface.register("replica", eager_mask)
    _select(model, "replica")
    layers = dict.fromkeys(("decoder", "encoder", "cross"), 0)
    biases: dict[str, Any] = {}
    for name, module in model.named_modules():
        stack, last = ("encoder" if "encoder." in name else "decoder"), name.rpartition(".")[2]
        part = PART_OF.get(last) or PART_OF.get(f"{stack}.{last}")
        if part is None:
            continue
        if getattr(module, "has_relative_attention_bias", False):
            biases[part] = module
        empty = (torch.zeros(4, 0, 8),) * 2
        module.replica_prefix = parts[part][layers[part]] if part in parts else empty
        module.__dict__["replica_bias"] = biases.get(part)  # a module, but no child of this one
        layers[part] += 1
    m = parts["decoder"][0][0].shape[1] if "decoder" in parts else 0
    table = getattr(model.get_decoder(), "embed_positions", None)
    if table is not None:
        hook = table.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"position_ids": kwargs["position_ids"] + m}), with_kwargs=True
        )
    yield model
    if table is not None:
        hook.remove()
    _select(model, "sdpa")


def _select(model: Any, implementation: str) -> None:
    """In transformers 5.17 set_attn_implementation does not reach T5's stacks."""
    for stack in (model, model.get_encoder(), model.get_decoder()):
        stack.config._attn_implementation = implementation
