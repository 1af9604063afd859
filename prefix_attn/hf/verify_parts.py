"""Compare a patched encoder-decoder model with prefixes copied in front of every layer's keys: the slow, plain way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.forward import evaluating
from prefix_attn.bank.geometry import DECODER
from prefix_attn.hf.attention import KEYWORD, original_attention
from prefix_attn.hf.part_attention import PARTS_IMPLEMENTATION, PLACE, PartBatch, Place, part_mask
from prefix_attn.hf.verify import TOKENS, check_close, some_tokens

#: The name of the slow way in transformers' registries, while it is compared.
REPLICA = "prefix_attn_parts_replica"


def verify_parts(model: Any, bank: PrefixBank, configs: Any) -> None:
    """Raise `UnsupportedModel` unless each task's logits equal those with its prefix copied into every layer.

    Args:
        model: patched with the bank.
        configs: its `OwnConfigs`.
    """
    AttentionInterface.register(REPLICA, replicated_attention)
    AttentionMaskInterface.register(REPLICA, part_mask)
    tokens = some_tokens(model, TOKENS)
    inputs = {model.main_input_name: _sound(model) if model.main_input_name == "input_features" else tokens}
    try:
        with torch.no_grad(), evaluating(model):
            for name in bank.names:
                logits = []
                for implementation in (PARTS_IMPLEMENTATION, REPLICA):
                    configs.select(model.modules(), implementation)
                    out = model(**inputs, decoder_input_ids=tokens, task_ids=[name], use_cache=False)
                    logits.append(out.logits)
                check_close(model, name, *logits)
    finally:
        configs.select(model.modules(), PARTS_IMPLEMENTATION)


def _sound(model: Any) -> Tensor:
    """Mel features of the length that Whisper's encoder takes: a slow wave in every bin."""
    time = torch.arange(sound_frames(model), device=model.device)
    bins = torch.arange(model.get_encoder().config.num_mel_bins, device=model.device)
    return torch.sin(0.1 * time + bins[:, None])[None].to(model.dtype)


def sound_frames(model: Any) -> int:
    """Frames of sound that Whisper's encoder takes."""
    encoder = model.get_encoder()
    return int(encoder.config.max_source_positions * encoder.conv1.stride[0] * encoder.conv2.stride[0])


def replicated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """One layer's eager attention for one row without padding, over a copy of its prefix and its own keys."""
    batch: PartBatch = kwargs[KEYWORD]
    place: Place = getattr(module, PLACE)
    assert batch.bank is not None
    assert batch.task_ids is not None
    prefix = batch.bank.layer(place.layer, place.part)
    start, m = prefix.spans[int(batch.task_ids)]
    k, v = (torch.cat([x[None, :, start : start + m], own], dim=2) for x, own in ((prefix.k, key), (prefix.v, value)))
    q_len, total = query.shape[2], k.shape[2]
    mask = query.new_zeros(1, 1, q_len, total)
    if place.part == DECODER:
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(total - q_len + 1), float("-inf"))
    options = {}
    if place.bias is not None:  # the family's own bias, for prefix and tokens as one sequence
        holder: Any = place.bias
        options["position_bias"] = holder.compute_bias(total, total)[:, :, -q_len:].to(query.device)
    return original_attention(module, "eager")(module, query, k, v, mask, scaling=scaling, dropout=0.0, **options)
