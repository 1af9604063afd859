"""What a bank reads off an encoder-decoder model: the geometry of its three parts, and the decoder's positions.

The decoder runs on one token and one made-up state of the encoder; its caches show the keys and values of both its
attentions. The encoder keeps no cache: its config says how many heads it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prefix_attn.bank.config import context_limit, setting
from prefix_attn.bank.forward import FAILURES, evaluating, in_full_precision
from prefix_attn.bank.geometry import Geometry, LayerGeometry, LayerKV
from prefix_attn.errors import UnsupportedModel


def decoder_kv(model: Any) -> tuple[list[LayerKV], list[LayerKV]]:
    """The k and v per layer that an unwrapped model's decoder computes for one token: in its self-attention, and in its
    cross-attention; each ``[kv_heads, 1, head_dim]``.

    Raises:
        UnsupportedModel: the decoder does not keep both in plain caches.
    """
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.cache_utils import DynamicLayer

    from prefix_attn.bank.cache_argument import CACHE

    decoder, family = model.get_decoder(), model.config.model_type
    caches = DynamicCache(), DynamicCache()
    try:
        weight = decoder.get_input_embeddings().weight
        states = torch.zeros(1, 1, model.get_encoder().config.hidden_size, dtype=weight.dtype, device=weight.device)
        with torch.no_grad(), in_full_precision(model), evaluating(model):
            decoder(
                input_ids=torch.zeros(1, 1, dtype=torch.int64, device=weight.device), encoder_hidden_states=states,
                use_cache=True, **{CACHE: EncoderDecoderCache(*caches)},
            )  # fmt: skip
    except FAILURES as error:
        raise UnsupportedModel(
            f"model: the decoder of {family} does not run with a plain EncoderDecoderCache "
            f"({type(error).__name__}: {error})"
        ) from error
    layers = setting(decoder.config, "decoder_layers") or setting(decoder.config, "num_hidden_layers")
    for cache, what in zip(caches, ("self", "cross"), strict=True):
        plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
        if len(cache.layers) != layers or not plain:
            raise UnsupportedModel(
                f"model: expected the {what}-attention of {family} to cache keys and values in each of the decoder's "
                f"{layers} layers, got {len(cache.layers)} cached layers"
            )
    self_kv, cross_kv = ([(layer.keys[0], layer.values[0]) for layer in cache.layers] for cache in caches)
    return self_kv, cross_kv


def encoder_geometry(model: Any) -> Geometry:
    """Heads of the encoder's self-attention in every layer, from its config."""
    config = model.get_encoder().config
    layers, heads, hidden = (setting(config, k) for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    if not all(isinstance(x, int) and x > 0 for x in (layers, heads, hidden)):
        raise UnsupportedModel(
            f"model: expected the encoder's config of {config.model_type} to say num_hidden_layers, "
            f"num_attention_heads and hidden_size, got {layers}, {heads} and {hidden}"
        )
    dim = setting(config, "head_dim") or hidden // heads
    return Geometry((LayerGeometry(heads, dim, dim),) * layers)


def encoder_devices(model: Any, elsewhere: torch.device) -> tuple[torch.device, ...]:
    """The device of each layer of the encoder; ``elsewhere`` for one whose weights are brought for each call."""
    encoder = model.get_encoder()
    count = len(encoder_geometry(model).layers)
    lists = (child for child in encoder.children() if isinstance(child, nn.ModuleList) and len(child) == count)
    weights = ((p.device for p in layer.parameters() if not p.is_meta) for layer in next(lists, [nn.Module()] * count))
    return tuple(next(devices, elsewhere) for devices in weights)


def encoder_positions(model: Any) -> int | None:
    """Positions the encoder has; None where a relative bias takes their place."""
    config = model.get_encoder().config
    return None if setting(config, "relative_attention_num_buckets") else context_limit(config)


def decoder_positions(config: Any) -> int | None:
    """Positions the decoder has; None where a relative bias takes their place."""
    if setting(config, "relative_attention_num_buckets"):
        return None
    limit = setting(config, "max_target_positions")
    return limit if isinstance(limit, int) else context_limit(config)
