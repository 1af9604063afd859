"""Is an output right? By `prefix_attn.tolerance`: at most twice the error of eager attention in the same dtype.

Others are allowed twice as much: the tolerance is a promise of ours, and another order of sums is not a wrong result.

The reference is the formula in float64 on a few rows of the batch, some heads at a time: scores in float64 of a whole
prefill would not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefix_attn.backends import reference
from prefix_attn.tolerance import FORWARD, error, fault
from prefix_attn.types import AttentionCall

from .problem import Problem

ROWS = 4

#: How many times eager attention's error a peer's may be.
OF_PEERS = 2 * FORWARD

#: Scores held at once: 0.5 GB of float64, a few times over.
MAX_SCORES = 2**26


@dataclass(frozen=True)
class Reference:
    """The right answer for some rows of a problem, and how far eager attention is from it."""

    rows: list[int]
    exact: Tensor  # float64 [rows, H, Q, D]
    eager: Tensor  # the problem's dtype
    eager_error: float

    @classmethod
    def of(cls, problem: Problem) -> Reference:
        """Compute it; reads back to the host."""
        last = problem.point.batch - 1
        rows = sorted({round(i * last / (ROWS - 1)) for i in range(ROWS)})
        exact = _attend_rows(problem.call, rows, torch.float64)
        eager = _attend_rows(problem.call, rows, problem.q.dtype)
        return cls(rows, exact, eager, error(eager, exact))

    def check(self, out: Tensor, problem: Problem, factor: float = FORWARD) -> tuple[float | None, str | None]:
        """An output's error (None if it is not finite) and what is wrong with it (None if it passes); any shape.

        It may err ``factor`` times as much as eager attention.
        """
        out = out.reshape(problem.q.shape)
        if not bool(out.isfinite().all()):
            return None, "elements are NaN, infinite or were never written"
        got = out[self.rows]
        return error(got, self.exact), fault(got, self.eager, self.exact, factor)


def _attend_rows(call: AttentionCall, rows: list[int], dtype: torch.dtype) -> Tensor:
    """The formula in ``dtype`` for some rows: ``[rows, H, Q, D]``."""
    keys = call.kv_capacity + max(m for _, m in call.prefix.spans)
    heads = max(1, min(call.kv_heads, MAX_SCORES // max(1, call.group * call.q_len * keys)))
    outs = []
    for b in rows:
        row = call.row(b)
        parts = [
            reference.attend(_kv_heads(row, h, min(h + heads, call.kv_heads)), dtype)[0]
            for h in range(0, call.kv_heads, heads)
        ]
        outs.append(torch.cat(parts, dim=1))
    return torch.cat(outs)


def _kv_heads(call: AttentionCall, begin: int, end: int) -> AttentionCall:
    """The call restricted to some kv heads and the query heads that share them."""
    kv, prefix = slice(begin, end), call.prefix
    return replace(
        call, q=call.q[:, begin * call.group : end * call.group], k=call.k[:, kv], v=call.v[:, kv],
        prefix=replace(prefix, k=prefix.k[kv], v=prefix.v[kv]),
    )  # fmt: skip


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Within, PyTorch fills new tensors with NaN: an element that a kernel forgets to write, or reads early, shows.

    It does so by itself (`torch.utils.deterministic.fill_uninitialized_memory`) when asked for determinism.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
