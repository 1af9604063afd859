"""This project's kernels: as a caller gets them, and made to run in one way, for what that way costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

import prefix_attn as pa
from prefix_attn.backends import triton
from prefix_attn.plan import BatchPlan, RowTiles

from .interface import Peer, elapsed_us
from .problem import Point, Problem


class Ours(Peer):
    """`prefix_attention` over the shared prefixes, with the batch's plan made beforehand."""

    ours = True
    version = pa.__version__

    def __init__(self, name: str = "prefix_attn", backend: str = "triton", batch_invariant: bool = False) -> None:
        self.name = name
        self.backend = backend
        self.batch_invariant = batch_invariant

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        plan, self.plan_us = None, None
        if self.backend == "triton" and problem.point.op == "decode":
            distinct = len(set(problem.point.task_ids))  # a caller has names, and bank.plan counts them
            plan = BatchPlan(problem.task_ids, problem.prefix.lens, distinct)
            self.work_out(plan, problem)

        def call() -> Tensor:
            out = pa.prefix_attention(
                problem.q, problem.k, problem.v, problem.prefix, problem.task_ids, backend=self.backend,
                batch_invariant=self.batch_invariant, plan=plan,
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out

        return call

    def work_out(self, plan: BatchPlan, problem: Problem) -> RowTiles:
        """The plan's tiles, which a capture then finds: one layer is timed, and a plan serves all of them."""
        call = problem.call
        rows = call.q_len * call.group
        BatchPlan(plan.task_ids, plan.lens).tiles(rows)  # the first of a process loads kernels
        self.plan_us = elapsed_us(lambda: plan.tiles(rows), problem.q.device)
        return plan.tiles(rows)


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
        tiles = None
        if self.regime == "grouped":
            tiles = self.work_out(BatchPlan(problem.task_ids, problem.prefix.lens), problem)
        attention_call = replace(problem.call, tiles=tiles)

        def call() -> Tensor:
            return triton.forward(attention_call)[0]

        return call


class OursInPlace(Ours):
    """A whole step, as `SdpaInPlace` takes it: the newest keys are written to the rows' preallocated caches first."""

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        append, attend = problem.append_newest(problem.k, problem.v), super().prepare(problem)

        def call() -> Tensor:
            append()
            return attend()

        return call
