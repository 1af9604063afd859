"""Fast prefix tuning: attention over a shared bank of per-task prefixes, and a patch for Hugging Face models."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from prefix_attn.bank import PrefixBank as PrefixBank
    from prefix_attn.hf import patch as patch
    from prefix_attn.hf import unpatch as unpatch

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "ContextOverflow",
    "DTypeError",
    "IncompatiblePrefix",
    "PrefixAttnError",
    "PrefixBank",
    "PrefixKV",
    "ShapeError",
    "UnknownTask",
    "UnsupportedModel",
    "explain",
    "patch",
    "prefix_attention",
    "unpatch",
]

_LAZY = {"PrefixBank": "prefix_attn.bank", "patch": "prefix_attn.hf", "unpatch": "prefix_attn.hf"}


def __getattr__(name: str) -> Any:
    """Import what needs transformers only when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'prefix_attn' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
