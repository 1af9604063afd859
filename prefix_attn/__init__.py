"""Fast prefix tuning: attention over a shared bank of per-task prefixes, and a patch for Hugging Face models."""

from prefix_attn.attention import explain, prefix_attention
from prefix_attn.errors import (
    BackendUnavailable,
    ContextOverflow,
    DTypeError,
    IncompatiblePrefix,
    PrefixAttnError,
    ShapeError,
    UnknownTask,
    UnsupportedModel,
)
from prefix_attn.types import PrefixKV

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "ContextOverflow",
    "DTypeError",
    "IncompatiblePrefix",
    "PrefixAttnError",
    "PrefixKV",
    "ShapeError",
    "UnknownTask",
    "UnsupportedModel",
    "explain",
    "prefix_attention",
]
