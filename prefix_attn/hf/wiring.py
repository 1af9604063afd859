"""How a patched model is known, and a value in the place of ``task_ids`` that shows whether they reach a hook."""

from __future__ import annotations

from typing import Any

from prefix_attn.bank import PrefixBank

#: The attribute of a patched model that holds what `unpatch` needs.
PATCHED = "_prefix_attn"


def bank_of(model: Any) -> PrefixBank | None:
    """The bank that a model, or the one in PEFT's wrapper, is patched with; None for one that is not."""
    return getattr(getattr(model, PATCHED, None), "bank", None)


class Wired(Exception):
    """Raised by a hook to say that the probe arrived."""


#: Given as ``task_ids``; a hook that meets it raises `Wired`.
PROBE: Any = object()
