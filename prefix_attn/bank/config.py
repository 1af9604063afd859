"""What a transformers config says, where models say it in different ways."""

from __future__ import annotations

from typing import Any

from prefix_attn.errors import UnsupportedModel


def text_config(model: Any) -> Any:
    """The config of the part that holds the decoder's layers; an encoder-decoder model's own config."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise UnsupportedModel(f"model: expected a Hugging Face transformers model, got {type(model).__name__}")
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def setting(config: Any, key: str) -> Any:
    """A value of a config, or None where it has none, or one per layer (transformers then refuses the question)."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


def context_limit(config: Any) -> int | None:
    """Positions a model has, from its (text) config; None where nothing limits them, as with ALiBi or T5's bias."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        limit = setting(config, key)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None
