"""The keys and values that a frozen model computes for some tokens, as its attention sees them.

One run of one token shows what no config says the same way in 160 model types: kv_heads and head_dim of every layer,
and the dtype and device that attention works in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefix_attn.bank.geometry import LayerKV, setting
from prefix_attn.errors import UnsupportedModel


def unwrap(model: Any) -> Any:
    """The base model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: Any) -> Any:
    """The config of the part that holds the decoder's layers; an encoder-decoder model's own config."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise UnsupportedModel(f"model: expected a Hugging Face transformers model, got {type(model).__name__}")
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def cached_kv(model: Any, input_ids: Tensor) -> list[LayerKV]:
    """Run an unwrapped model on ``input_ids [1, m]`` at positions 0..m-1, and return k, v per layer.

    The model runs without gradients and in evaluation mode (dropout would change the result); its mode is restored.
    The cache is made without a config: one made with it forgets what lies outside a sliding window.

    Returns:
        Per layer k and v, each ``[kv_heads, m, head_dim]``, in the dtype and on the device of that layer's attention.

    Raises:
        UnsupportedModel: the model keeps something else than one key and one value per token and layer.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = text_config(model)
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"model: expected a decoder-only model, got the encoder-decoder {config.model_type}; keys and values of a "
            "text in its decoder depend on the encoder's input; train a prefix, and use add or load"
        )
    if any(p.is_meta for p in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise UnsupportedModel("model: expected loaded weights, got parameters on the meta device; load them first")
    body = getattr(model, "base_model", model)  # without the language-model head, whose logits nobody reads
    cache = DynamicCache()
    device = body.get_input_embeddings().weight.device
    input_ids = input_ids.to("cpu" if device.type == "meta" else device)  # accelerate moves inputs of offloaded layers
    try:
        with torch.no_grad(), evaluating(model):
            body(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), past_key_values=cache, use_cache=True)
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"model: {config.model_type} does not run with a plain cache of keys and values "
            f"({type(error).__name__}: {error})"
        ) from error
    layers = setting(config, "num_hidden_layers")
    if len(cache.layers) != layers or setting(config, "num_kv_shared_layers"):
        raise UnsupportedModel(
            f"model: expected {config.model_type} to cache keys and values in each of its {layers} "
            f"layers, got {len(cache.layers)} cached layers; some share them or keep another state"
        )
    result = []
    for i, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer or not layer.is_initialized:
            raise UnsupportedModel(
                f"model: layer {i} of {config.model_type} keeps no keys and values, so no prefix can reach it"
            )
        k, v = layer.keys, layer.values
        if k.ndim != 4 or k.shape != v.shape or (k.shape[0], k.shape[2]) != tuple(input_ids.shape):
            raise UnsupportedModel(
                f"model: layer {i} of {config.model_type}: expected k and v of one shape "
                f"[1, kv_heads, m, head_dim], got {list(k.shape)} and {list(v.shape)}"
            )
        result.append((k[0], v[0]))
    return result


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
