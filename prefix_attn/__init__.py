"""Fast prefix tuning: attention over a shared bank of per-task prefixes, and a patch for Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefix_attn.errors import (
    BackendUnavailable,
    ContextOverflow,
    DTypeError,
    IncompatiblePrefix,
    PaddingInWindow,
    PrefixAttnError,
    RepeatedBOS,
    ShapeError,
    SlowModel,
    UnknownTask,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from prefix_attn import training as training
    from prefix_attn.attention import explain as explain
    from prefix_attn.attention import prefix_attention as prefix_attention
    from prefix_attn.bank import PrefixBank as PrefixBank
    from prefix_attn.hf import TextGenerationPipeline as TextGenerationPipeline
    from prefix_attn.hf import patch as patch
    from prefix_attn.hf import unpatch as unpatch
    from prefix_attn.types import PrefixKV as PrefixKV

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "ContextOverflow",
    "DTypeError",
    "IncompatiblePrefix",
    "PaddingInWindow",
    "PrefixAttnError",
    "PrefixBank",
    "PrefixKV",
    "RepeatedBOS",
    "ShapeError",
    "SlowModel",
    "TextGenerationPipeline",
    "UnknownTask",
    "UnsupportedModel",
    "explain",
    "patch",
    "prefix_attention",
    "training",
    "unpatch",
]

#: What needs torch or transformers, and where it lives: imported when first asked for, so that importing costs nothing.
_LAZY = {
    "PrefixBank": "prefix_attn.bank",
    "PrefixKV": "prefix_attn.types",
    "TextGenerationPipeline": "prefix_attn.hf",
    "explain": "prefix_attn.attention",
    "patch": "prefix_attn.hf",
    "prefix_attention": "prefix_attn.attention",
    "training": "prefix_attn.training",
    "unpatch": "prefix_attn.hf",
}


if not TYPE_CHECKING:  # else every name would seem to be there

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'prefix_attn' has no attribute {name!r}")
        module = import_module(_LAZY[name])
        globals()[name] = value = module if name == "training" else getattr(module, name)  # asked once
        return value


def __dir__() -> list[str]:
    return __all__
