"""Whether a prefix was made for these very weights: two SHA-256 digests of a model.

config:  what fixes the meaning of keys and values: model type, sizes, rotary parameters, attention windows.
weights: names and shapes of all parameters, and of buffers that a checkpoint holds, and up to 64 elements of each, as
         bfloat16, so that one checkpoint loaded in bfloat16 and in float32 agrees. Other buffers are derived.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prefix_attn.bank.config import setting
from prefix_attn.bank.forward import place_of
from prefix_attn.bank.geometry import DECODER, Geometry
from prefix_attn.errors import UnsupportedModel

SAMPLE = 64
FLOAT16_TINY = 2.0**-14
#: Knuth's multiplicative hash: spreads the sampled elements over rows and columns, whatever the width of a row.
STRIDE = 2654435761
#: Only keys that every supported version of transformers writes alike; the rest of a config may change between them.
CONFIG_KEYS = ("model_type", "hidden_size", "num_attention_heads", "vocab_size", "sliding_window")
#: Of an encoder-decoder model also.
SEQ2SEQ_KEYS = ("scale_embedding", "relative_attention_num_buckets", "relative_attention_max_distance")
ROPE_KEYS = (
    "rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast",
    "beta_slow", "short_factor", "long_factor", "mscale", "mscale_all_dim", "partial_rotary_factor",
    "original_max_position_embeddings",
)  # fmt: skip


#: Where a layer is, within what PEFT puts around it to adapt it, or `torch.compile` to compile it.
WRAPPED = ("base_layer", "original_module", "token_adapter")
COMPILED = "_orig_mod"
#: Dtypes of buffers that are no weights.
COUNTS = (torch.int64, torch.bool)


@dataclass(frozen=True)
class Fingerprint:
    """Two hex digests; equal when the models agree."""

    config: str
    weights: str

    @classmethod
    def of(cls, model: nn.Module, config: Any, geometries: Mapping[str, Geometry]) -> Fingerprint:
        """Of an unwrapped model with its text config. Reads 64 elements per weight, in one transfer per device."""
        return cls(config_digest(config, geometries), weights_digest(model))


def config_digest(config: Any, geometries: Mapping[str, Geometry]) -> str:
    """SHA-256 of the keys above, as sorted JSON without nulls."""
    facts = {key: setting(config, key) for key in CONFIG_KEYS}
    facts["geometry"] = geometries[DECODER].to_json()
    if len(geometries) > 1:
        facts |= {key: setting(config, key) for key in SEQ2SEQ_KEYS}
        facts["parts"] = {part: geometry.to_json() for part, geometry in geometries.items()}
    facts["rope"] = _rope(setting(config, "rope_parameters") or {})
    kinds = setting(config, "layer_types") or []
    facts["layer_types"] = list(kinds) if set(kinds) - {"full_attention"} else None
    facts = {key: value for key, value in facts.items() if value is not None}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over `own_weights` in the order of their names: name, shape, sampled elements in bfloat16."""
    parameters = sorted(own_weights(model), key=lambda named: named[0])
    samples = [_sample(p) for _, p in parameters]
    on_host: dict[int, Tensor] = {}
    for device in {s.device for s in samples}:
        members = [i for i, s in enumerate(samples) if s.device == device]
        flat = torch.cat([samples[i] for i in members]).cpu()
        on_host.update(zip(members, torch.split(flat, [samples[i].numel() for i in members]), strict=True))
    digest = hashlib.sha256()
    for i, (name, p) in enumerate(parameters):
        digest.update(f"{name}{list(p.shape)}".encode())
        digest.update(on_host[i].view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def own_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors behind a model's parameters and the buffers that are saved with them, by name.

    The weights of PEFT's adapters are left out, and those below them keep the names they had: a model with LoRA has
    the base's own fingerprint. Parameters that accelerate has put elsewhere are fetched. A quantised weight that
    consists of several tensors gives each.
    """
    modules = dict(model.named_modules())
    for name, p in chain(model.named_parameters(), _saved_buffers(modules)):
        own_name = _own_name(modules, name)
        if own_name is not None:
            yield from _tensors(own_name, _fetched(modules, name, p).detach())
    for name, module in modules.items():
        if hasattr(module, "_weight_bias"):  # torch.ao's quantised layers, whose weights are no parameters
            weight, _ = module._weight_bias()
            by_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
            yield f"{name}.weight", weight.int_repr()
            yield f"{name}.scale", weight.q_per_channel_scales() if by_channel else torch.tensor(weight.q_scale())


def _own_name(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """A weight's name in the plain model; None for one of an adapter."""
    path, kept = "", list[str]()
    for part in name.split("."):
        of_peft = hasattr(modules.get(path), "adapter_layer_names")
        path = f"{path}.{part}" if path else part
        if of_peft and part not in WRAPPED:
            return None
        if not of_peft and part != COMPILED:
            kept.append(part)
    return ".".join(kept)


def _saved_buffers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """All but those that count or point."""
    for name, module in modules.items():
        for key, x in module._buffers.items():
            if x is not None and x.dtype not in COUNTS and key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}" if name else key, x


def _fetched(modules: Mapping[str, nn.Module], name: str, p: Tensor) -> Tensor:
    """The parameter itself, or, of one offloaded by accelerate, its values."""
    if not p.is_meta:
        return p
    place = place_of(modules, name)
    if place is None:
        raise UnsupportedModel("model: expected loaded weights, got parameters on the meta device; load them first")
    weights, key = place
    return weights[key]


def _tensors(name: str, p: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors a tensor consists of; itself, unless it wraps others. Shards are gathered."""
    if hasattr(p, "full_tensor"):  # a DTensor
        p = p.full_tensor()
    if not is_traceable_wrapper_subclass(p):
        yield name, p
        return
    for part in p.__tensor_flatten__()[0]:
        yield from _tensors(f"{name}.{part}", getattr(p, part))


def _sample(p: Tensor) -> Tensor:
    """Up to `SAMPLE` elements of p in bfloat16, chosen by position alone."""
    n = p.numel()
    index = torch.arange(min(n, SAMPLE), dtype=torch.int64, device=p.device)
    if n > SAMPLE:
        index = index * STRIDE % n
    if p.dtype.itemsize == 1:  # quantised weights: their bytes, since few operators take their dtypes
        p = p.view(torch.uint8)
    sample = p.take(index).to(torch.bfloat16)
    # What float16 does not hold as it is: a checkpoint in bfloat16 may be loaded in that, too.
    return torch.where(sample.abs() < FLOAT16_TINY, 0, sample)


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """The known rotary parameters; some models keep one set per kind of layer."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {kind: _rope(value) for kind, value in parameters.items() if isinstance(value, dict)}
    return {key: _plain(parameters[key]) for key in ROPE_KEYS if parameters.get(key) is not None}


def _plain(value: Any) -> Any:
    """Numbers as floats: whether 10000 or 10000.0 stands in a config differs between versions."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, str) else float(value)
