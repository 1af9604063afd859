"""What transformers calls a cache among the arguments and outputs of a model: ``cache`` since 5.24."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

#: Until 5.40, models take the old name too, with a warning.
OLD = "past_key_values"
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else OLD


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache of a call, by either name; None without one."""
    given = arguments.get(CACHE)
    return arguments.get(OLD) if given is None else given
