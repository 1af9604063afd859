"""When is a result right? The one policy, by which tests pass and benchmarks agree to time.

Against the formula in float64, a forward result may err at most twice as much as eager PyTorch in the same dtype, a
gradient three times; plus one rounding of the result, so that a case where eager happens to be exact can pass.
In float32 on a GPU it is four: exponentials and quotients of its special function units are each off by up to two (PTX
ISA: ex2.approx, div.full). float64 inputs have no finer oracle: there, two correct results differ by a few
roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0


def error(x: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference; infinities must agree in place and sign, NaN never passes."""
    x, oracle = x.double(), oracle.double()
    difference = torch.where(x == oracle, 0.0, (x - oracle).abs())
    return float(difference.nan_to_num(nan=float("inf")).max()) if x.numel() else 0.0


def fault(x: Tensor, eager: Tensor, oracle: Tensor, factor: float = FORWARD) -> str | None:
    """What is wrong with ``x``, None if it errs at most ``factor`` times what ``eager`` errs, against ``oracle``.

    Args:
        x: the result to judge.
        eager: eager PyTorch's, in the same dtype.
        oracle: the formula's, in float64.
        factor: `FORWARD` or `GRADIENT`.
    """
    if x.shape != oracle.shape:
        return f"shape {list(x.shape)}, expected {list(oracle.shape)}"
    finite = oracle[oracle.isfinite()]
    roundings = 32 if x.dtype == torch.float64 else 4 if x.dtype == torch.float32 and x.is_cuda else 1
    rounding = roundings * torch.finfo(x.dtype).eps * max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)
    allowed = factor * error(eager, oracle) + rounding
    got = error(x, oracle)
    if got <= allowed:
        return None
    return f"error {got:.2e} against float64, allowed {allowed:.2e} ({factor} x eager {x.dtype})"
