"""This project's kernels: as a caller gets them, and made to run in one way, for what that way costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from torch import Tensor

import prefix_attn as pa
from prefix_attn.backends import triton
from prefix_attn.plan import BatchPlan, RowTiles

from .interface import Peer, elapsed_us
from .problem import Point, Problem


class PlanBefore(BatchPlan):
    """A plan worked out once and not again in a capture: one layer is timed here, and a plan serves all of them."""

    @cached_property
    def done(self) -> dict[tuple[int, ...], RowTiles]:
        return {}

    def tiles(self, *sizes: int) -> RowTiles:
        if sizes not in self.done:
            self.done[sizes] = super().tiles(*sizes)
        return self.done[sizes]


class Ours(Peer):
    """`prefix_attention` over the shared prefixes, with the batch's plan made beforehand."""

    ours = True
    version = pa.__version__

    def __init__(self, name: str = "prefix_attn", backend: str = "triton", batch_invariant: bool = False) -> None:
        self.name = name
        self.backend = backend
        self.batch_invariant = batch_invariant

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        plan = self.planned(problem) if self.backend == "triton" and problem.point.op == "decode" else None

        def call() -> Tensor:
            out = pa.prefix_attention(
                problem.q, problem.k, problem.v, problem.prefix, problem.task_ids, backend=self.backend,
                batch_invariant=self.batch_invariant, plan=plan,
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out

        if plan is not None:
            call()  # asks for the tiles it will use; a capture must find them
        return call

    def planned(self, problem: Problem) -> BatchPlan:
        """The plan of the batch, worked out; its time is noted."""
        plan = PlanBefore(problem.task_ids, problem.prefix.lens)
        rows = problem.point.q_len * problem.point.group
        self.plan_us = elapsed_us(lambda: plan.tiles(rows), problem.q.device)
        return plan


class OwnKeysOnly(Ours):
    """The same kernels on the rows' own keys alone: the difference to `Ours` is the cost of a prefix."""

    with_prefix = False

    def __init__(self, name: str = "prefix_attn without prefix", backend: str = "triton") -> None:
        super().__init__(name, backend)

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        return super().prepare(problem.without_prefix)


class OneRegime(Ours):
    """One of the two ways of decode, whichever the package would take: from both, regime.py's constants are fitted."""

    def __init__(self, regime: str) -> None:
        super().__init__(f"prefix_attn, {regime}")
        self.regime = regime

    def unsuited(self, point: Point) -> str | None:
        return None if point.op == "decode" else "it is a way of decode"

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        rows = problem.point.q_len * problem.point.group
        tiles = self.planned(problem).tiles(rows) if self.regime == "grouped" else None
        attention_call = replace(problem.call, tiles=tiles)

        def call() -> Tensor:
            return triton.forward(attention_call)[0]

        return call
