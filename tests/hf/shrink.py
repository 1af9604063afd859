"""A tiny random model of any type that transformers knows, causal or of images and text, from its default config.

Every config of transformers is a dataclass; sizes keep the meaning of their names across families, so one table makes
them small. Lists with one entry per layer are cut to one layer of each kind (at least two layers). What a family needs
beyond that stands in overrides.py.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.hf.overrides import OVERRIDES, REQUIRED

#: Every causal-LM type of the installed transformers, and its class.
CAUSAL = dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))

#: Every type that reads images and text and writes text, and its class, but for those whose class is a causal LM's.
IMAGE_TEXT = {
    t: name for t, name in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()) if CAUSAL.get(t) != name
}

#: Types whose vision tower is one of timm, which need not be installed; they get another.
TIMM = ("fast_vlm", "gemma3n", "perception_lm")

MAX_LAYERS = 6
LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_encoder_layers",
    "num_decoder_layers", "num_blocks", "depth",
)  # fmt: skip

#: Config attribute -> tiny value, wherever a config has the attribute and does not leave it None.
SIZES: dict[str, Any] = {
    **dict.fromkeys(LAYER_COUNTS, 2),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim", "embedding_dim"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys((
        "intermediate_size", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "dff",
        "dim_ff", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
        "expert_ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "n_inner",
        "moe_shared_expert_intermediate_size",
    ), 48),
    **dict.fromkeys((
        "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads",
        "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
    ), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "d_head", "d_kv", "kv_channels"), 16),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys((
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "model_max_length",
    ), 128),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "local_attention"), 12),
    **dict.fromkeys((
        "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
    ), 4),
    **dict.fromkeys((
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "topk_group", "n_group",
        "moe_num_shared_experts", "n_shared_experts", "num_shared_experts", "num_expert_group",
    ), 2),
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 12, "kv_lora_rank": 16,
    "q_lora_rank": 24, "query_pre_attn_scalar": 16,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_heads": 4, "linear_head_dim": 8, "chunk_size": 8, "state_size": 8, "time_step_rank": 4,
    "max_source_positions": 24, "num_mel_bins": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

#: Set also where the default is None.
EVEN_IF_NONE = (
    "num_key_value_heads", "num_experts_per_tok", "head_dim", "n_group", "topk_group", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip


def tiny_kwargs(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments that make ``config_class`` tiny."""
    default = config_class(**REQUIRED.get(config_class.model_type, {}))
    names = {field.name for field in fields(config_class)}
    kwargs = {
        name: value
        for name, value in SIZES.items()
        if name in names and (name in EVEN_IF_NONE or isinstance(_value(default, name), (int, list)))
    }
    layers = next((name for name in LAYER_COUNTS if name in names), None)
    if layers is not None:
        kwargs |= _one_layer_of_each_kind(default, layers, names)
    if "kv_lora_rank" in names:
        kwargs.pop("num_key_value_heads", None)  # latent attention has a key for every query head
        kwargs["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in config_class.sub_configs:
        part = _value(default, name)
        if name in names and isinstance(part, PreTrainedConfig):
            kwargs[name] = (
                {"model_type": part.model_type} | tiny_kwargs(type(part)) | OVERRIDES.get(part.model_type, {})
            )
    return kwargs


def _one_layer_of_each_kind(default: PreTrainedConfig, count: str, names: set[str]) -> dict[str, Any]:
    """The layer count, and lists with an entry per layer cut to it."""
    total = _value(default, count)
    per_layer = {
        name: value
        for name in sorted(names)
        if isinstance(value := _value(default, name), (list, tuple)) and len(value) == total
    }
    if not per_layer:
        return {}
    first: dict[Any, int] = {}
    for i in range(total):
        first.setdefault(str([value[i] for value in per_layer.values()]), i)
    chosen = sorted(first.values())[:MAX_LAYERS]
    chosen = chosen if len(chosen) > 1 else [0, 1]
    cut = {name: [value[i] for i in chosen] for name, value in per_layer.items()}
    return {count: len(chosen)} | {
        name: [SIZES.get(name, x) if isinstance(x, int) and not isinstance(x, bool) else x for x in value]
        for name, value in cut.items()
    }


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def tiny_config(model_type: str) -> Any:
    """The tiny config of a model type."""
    config_class = CONFIG_MAPPING[model_type]
    kwargs = tiny_kwargs(config_class)
    for name, value in OVERRIDES.get(model_type, {}).items():
        kwargs[name] = kwargs[name] | value if isinstance(kwargs.get(name), dict) and isinstance(value, dict) else value
    config = config_class(**kwargs)
    if model_type in TIMM:
        tower = transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            rms_norm_eps=1e-6,
            vocab_size=8,
            vocab_offset=99,
            model_args={"embed_dim": 32},
        )
        object.__setattr__(config, "vision_config", tower)
    return config


def tiny_random_model(model_type: str, class_name: str = "") -> Any:
    """A random model in float32, ready for inference; the same for the same arguments.

    Args:
        model_type: whose default config is made tiny.
        class_name: of the model; by default that of the type's causal LM.
    """
    torch.manual_seed(0)
    config = tiny_config(model_type)
    model_class = getattr(transformers, class_name or CAUSAL[model_type])
    text = config.get_text_config(decoder=True)
    if type(config) is not model_class.config_class is type(text):
        config = text  # the class takes the config of this part only
    if hasattr(config, "is_decoder") and not config.is_decoder:
        config.is_decoder = True
    model = model_class(config).float().eval()
    if model.can_generate():
        model.generation_config.forced_eos_token_id = model.generation_config.forced_bos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)  # the default of 0.02 makes attention, and so every prefix, invisible
            elif name.endswith(".self_attn.A"):
                parameter.normal_()  # how Doge weighs tokens when it drops some; its zeros would weigh all alike
    return model
