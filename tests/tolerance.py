"""The tolerance policy as an assertion; the policy itself is in `prefix_attn.tolerance`."""

from __future__ import annotations

from torch import Tensor

from prefix_attn.tolerance import FORWARD, GRADIENT, error, fault

__all__ = ["FORWARD", "GRADIENT", "assert_close", "error"]


def assert_close(name: str, x: Tensor, eager: Tensor, oracle: Tensor, factor: float = FORWARD) -> None:
    """Fail unless ``x`` errs at most ``factor`` times what ``eager`` errs, both against ``oracle`` (float64)."""
    wrong = fault(x, eager, oracle, factor)
    assert wrong is None, f"{name}: {wrong}"
