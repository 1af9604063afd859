"""What transformers calls a cache among the arguments and outputs of a model: ``cache`` since 5.24."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

#: Until 5.40, models take the old name too, with a warning.
OLD = "past_key_values"
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else OLD

#: Those that ``generate`` takes for it, the one that counts first.
NAMES = (CACHE, OLD, "cache_params")


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache of a call, by any name; None without one.

    Where it is given by two names, the new one counts, even if it says None: transformers ignores the other.
    """
    return next((arguments[name] for name in NAMES if name in arguments), None)


def cache_name(module: Any) -> str:
    """What a model calls its cache: code of its own (``trust_remote_code``) may keep to the old name."""
    parameters = signature(type(getattr(module, "_orig_mod", module)).forward).parameters
    return OLD if OLD in parameters and CACHE not in parameters else CACHE
