"""What all patches share: how a patched model is known, its calls' arguments, and a probe for its hooks."""

from __future__ import annotations

import inspect
from typing import Any

from prefix_attn.bank import PrefixBank

#: The attribute of a patched model that holds what `unpatch` needs.
PATCHED = "_prefix_attn"


def bank_of(model: Any) -> PrefixBank | None:
    """The bank that a model, or the one in PEFT's wrapper, is patched with; None for one that is not."""
    return getattr(getattr(model, PATCHED, None), "bank", None)


def parameters_of(module: Any) -> dict[str, inspect.Parameter]:
    """Those of a module's forward, as its class defines it: what wraps that of an instance need not say them."""
    forward = type(getattr(module, "_orig_mod", module)).forward  # of what is compiled
    _, *parameters = inspect.signature(forward).parameters.items()
    return dict(parameters)


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module's forward, all by name."""
    signature = inspect.Signature([*parameters_of(module).values()])
    named: dict[str, Any] = signature.bind_partial(*args, **kwargs).arguments
    named |= named.pop("kwargs", {})
    return named


class Wired(Exception):
    """Raised by a hook to say that the probe arrived."""


#: Given as ``task_ids``; a hook that meets it raises `Wired`.
PROBE: Any = object()
