"""The keys and values that a frozen model computes for some tokens, as its attention sees them.

One run of one token shows what no config says the same way in 160 model types: kv_heads and head_dim of every layer,
and the dtype and device that attention works in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prefix_attn.bank.config import text_config
from prefix_attn.bank.geometry import LayerKV
from prefix_attn.errors import PrefixAttnError, UnsupportedModel

#: What a model raises when it is run in a way it is not made for.
FAILURES = (
    AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip

#: A sliding window that no sequence fills. (PyTorch warns of slices by the largest integer.)
FOREVER = 1 << 40

#: Tensors that a cache layer may hold: keys and values, and what recurrent layers carry instead of them. Any other is
#: something kept for each token, which a prefix does not have.
KNOWN_STATES = {"keys", "values", "conv_states", "recurrent_states", "cumulative_length", "_sliding_window_tensor"}


def unwrap(model: Any) -> Any:
    """The base model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cached_kv(model: Any, input_ids: Tensor) -> list[LayerKV]:
    """Run an unwrapped model on ``input_ids [1, m]`` at positions 0..m-1, and return k, v per layer.

    The model runs without gradients and in evaluation mode (dropout would change the result); its mode is restored.

    Returns:
        What the cache keeps, per layer: k ``[kv_heads, m, head_dim]`` and v ``[kv_heads, m, v_head_dim]``, in the dtype
        and on the device of that layer's attention; without heads for a layer that keeps no keys.

    Raises:
        UnsupportedModel: no layer keeps keys and values, or one keeps more than them for each token.
    """
    from prefix_attn.bank.cache_argument import cache_name

    config = text_config(model)
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"model: expected a decoder-only model, got the encoder-decoder {config.model_type}; keys and values of a "
            "text in its decoder depend on the encoder's input; train a prefix with PEFT, and use load"
        )
    modules = dict(model.named_modules())
    if any(p.is_meta and place_of(modules, name) is None for name, p in model.named_parameters()):
        raise UnsupportedModel("model: expected loaded weights, got parameters on the meta device; load them first")
    if any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__):
        raise UnsupportedModel("model: its layers are sharded already; make the bank, and patch, before fully_shard")
    body = getattr(model, "base_model", model)  # without the language-model head, whose logits nobody reads
    input_ids = input_ids.to(device_of_inputs(model))
    try:
        cache = cache_of_all_tokens(model)
        with torch.no_grad(), in_full_precision(model), evaluating(model):
            if hasattr(model, "ct_decompress_hook"):  # of compressed-tensors, in front of the whole model's first pass
                model(input_ids=input_ids[:, :1])
            given = {cache_name(body): cache, **positions_of_generate(body, input_ids)}
            body(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=True, **given)
    except PrefixAttnError:
        raise
    except FAILURES as error:
        raise UnsupportedModel(
            f"model: {config.model_type} does not run with a plain cache of keys and values "
            f"({type(error).__name__}: {error})"
        ) from error
    layers = [_kept(layer, i, config.model_type, input_ids) for i, layer in enumerate(cache.layers)]
    if not any(k.shape[0] for k, _ in layers):
        raise UnsupportedModel(
            f"model: {config.model_type} keeps no keys and values in a cache, so no prefix can reach its layers"
        )
    return layers


def positions_of_generate(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Keywords of a forward call in a family that would count otherwise than transformers' ``generate``, from 0."""
    if counting_tokens(model) is None:
        return {}
    return {"position_ids": torch.arange(input_ids.shape[1], device=input_ids.device)[None]}


def counting_tokens(model: nn.Module) -> nn.Module | None:
    """The module of RoBERTa and its kin that, given no positions, counts tokens other than padding, from
    padding_idx + 1."""
    ways = ("create_position_ids_from_input_ids", "create_position_ids_from_inputs_embeds")
    return next((x for x in model.modules() if all(hasattr(x, way) for way in ways)), None)


def cache_of_all_tokens(model: Any) -> Any:
    """An empty cache as the model would make it, but for sliding layers: they keep all tokens."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        if hasattr(layer, "sliding_window"):
            layer.sliding_window = FOREVER
    return cache


def _kept(layer: Any, index: int, model_type: str, input_ids: Tensor) -> LayerKV:
    """k and v of a cache's layer; without heads where there are none."""
    k, v = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(k, Tensor) or not isinstance(v, Tensor) or not k.numel():
        return (input_ids.new_empty(0, input_ids.shape[1], 0, dtype=torch.float32),) * 2
    extra = [name for name, state in vars(layer).items() if name not in KNOWN_STATES and _has_tensor(state)]
    if extra:
        raise UnsupportedModel(
            f"model: layer {index} of {model_type} keeps more than a key and a value for each token "
            f"({', '.join(extra)}), which a prefix does not have"
        )
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or (k.shape[0], k.shape[2]) != tuple(input_ids.shape):
        raise UnsupportedModel(
            f"model: layer {index} of {model_type}: expected k and v of shapes [1, kv_heads, m, head_dim], "
            f"got {list(k.shape)} and {list(v.shape)} for m = {input_ids.shape[1]}"
        )
    return k[0], v[0]


def _has_tensor(state: Any) -> bool:
    return any(isinstance(x, Tensor) for x in (state.values() if isinstance(state, dict) else (state,)))


def place_of(modules: Mapping[str, nn.Module], name: str) -> tuple[Mapping[str, Tensor], str] | None:
    """Where accelerate keeps a parameter that is on the meta device, and under which key; None where it has none."""
    parts = name.split(".")
    for i in reversed(range(len(parts))):  # a hook may be on the module itself, or on one around it
        hook = getattr(modules.get(".".join(parts[:i])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            weights: Mapping[str, Tensor] | None = getattr(one, "weights_map", None)
            if weights is not None:
                return weights, ".".join(parts[i:])
    return None


def device_of_inputs(model: Any) -> torch.device:
    """Where a model takes tokens."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        weight = next(model.parameters())
    device: torch.device = weight.device
    return torch.device("cpu") if device.type == "meta" else device  # accelerate moves inputs of offloaded layers


def in_full_precision(model: Any) -> AbstractContextManager[Any]:
    """The model as if there were no autocast around it."""
    device = device_type(model)
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def device_type(model: Any) -> str:
    """That of a model's passes: what is on the meta device accelerate moves."""
    kind: str = model.device.type
    return kind if kind != "meta" else "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own mode is restored, and what some remember of the last batch."""
    training = [module for module in model.modules() if module.training]
    remembered = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, deltas in remembered:
            module.rope_deltas = deltas
