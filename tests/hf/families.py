"""A tiny random model of every supported family, and PEFT prefixes for it."""

from __future__ import annotations

from typing import Any

import torch
import transformers

LLAMA_LIKE = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MHA_LIKE = {key: value for key, value in LLAMA_LIKE.items() if key != "num_key_value_heads"}
GPT2_LIKE = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

#: model_type -> config arguments
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | {"head_dim": 16},
    "mistral": LLAMA_LIKE | {"sliding_window": 12},
    "mixtral": LLAMA_LIKE | MOE,
    "gemma2": LLAMA_LIKE | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": LLAMA_LIKE | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt2": GPT2_LIKE,
    "gpt_neox": MHA_LIKE,
    "opt": MHA_LIKE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "gpt_oss": LLAMA_LIKE | SLIDING | MOE | {"head_dim": 16},
}


def tiny_model(family: str, **overrides: Any) -> Any:
    """A random model in float32, ready for inference; the same for the same arguments."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(FAMILIES[family] | overrides))
    # in transformers 5.17 gemma2's sdpa differs from its eager formula by what the softcap does
    attention = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)  # the default of 0.02 makes attention, and so every prefix, invisible
            elif name.endswith("sinks"):
                parameter.normal_()
    return model


def geometry(model: Any) -> tuple[int, int, int]:
    """Layers, kv heads and head dim of a tiny model."""
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, kv_heads, head_dim


def random_prefix(model: Any, m: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer (k, v), each ``[kv_heads, m, head_dim]``."""
    layers, kv_heads, head_dim = geometry(model)
    rng = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, kv_heads, m, head_dim, generator=rng)) for _ in range(layers)]  # type: ignore[misc]
