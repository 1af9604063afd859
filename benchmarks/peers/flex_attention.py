"""FlexAttention with a task mask: all queries of the batch as one sequence over ``[all prefixes ; all rows' keys]``.

    q [1, H, B * q_len, D]        k, v [1, kv_heads, tokens of the bank + B * n, D]

A query sees a key of a prefix if that is its task's, and an own key if that is its row's and not in its future. The
block mask skips blocks of 128 queries by 128 keys in which nobody sees anything; it is made once per batch, and its
time is the plan's. Compiled anew for each shape: that takes seconds and is counted apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .interface import Peer, elapsed_us
from .problem import Point, Problem

#: Pairs of queries and keys up to which the mask is worked out: it is held as bytes, a few times over.
MAX_PAIRS = 2**32

#: Seconds of compilation after which no further shape is begun.
COMPILE_SECONDS = 20.0


class FlexAttention(Peer):
    """`flex_attention` under `torch.compile`; ``compiled=False`` is for tests, and slow."""

    name = "flex attention, task mask"
    version = f"torch {torch.__version__}"

    def __init__(self, compiled: bool = True, compile_seconds: float = COMPILE_SECONDS) -> None:
        self.compiled = compiled
        self.attend: Any = flex_attention
        if compiled:
            self.attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        self.compile_seconds = compile_seconds
        self.spent = 0.0
        self.latest: tuple[object, BlockMask] | None = None

    def unsuited(self, point: Point) -> str | None:
        pairs = point.batch * point.q_len * (point.tasks * point.m + point.batch * point.n)
        return f"its mask would be worked out from {pairs:.1e} pairs" if pairs > MAX_PAIRS else None

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        q_len, heads = problem.point.q_len, problem.point.q_heads
        q = problem.q.transpose(0, 1).flatten(1, 2)[None].contiguous()  # [1, H, B * q_len, D]
        k, v = (
            torch.cat([bank, own.transpose(0, 1).flatten(1, 2)], dim=1)[None].contiguous()
            for bank, own in ((problem.prefix.k, problem.k), (problem.prefix.v, problem.v))
        )
        mask, first = self._block_mask(problem)

        def call() -> Tensor:
            out: Tensor = self.attend(q, k, v, block_mask=mask, enable_gqa=problem.point.group > 1)
            return out.reshape(heads, -1, q_len, q.shape[3]).transpose(0, 1)

        if first and self.compiled:
            self._compile(call, problem.q.device)
        return call

    def _compile(self, call: Callable[[], Tensor], device: torch.device) -> None:
        """Make the first call of a shape; beyond the limit on recompilations PyTorch would run it unfused."""
        mask, self.latest = self.latest, None
        if self.spent >= self.compile_seconds:
            raise RuntimeError(f"{self.compile_seconds:.0f} s were spent on compiling it at earlier points")
        start = time.perf_counter()
        try:
            with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024):
                self.compile_s = 1e-6 * elapsed_us(call, device)
        finally:
            self.spent += time.perf_counter() - start
        self.latest = mask

    def _block_mask(self, problem: Problem) -> tuple[BlockMask, bool]:
        """The mask of the batch, and whether it is a new one; input sets of one point share theirs."""
        key = problem.point, tuple(problem.task_ids.tolist()), tuple(problem.prefix.spans)
        if self.latest is not None and self.latest[0] == key:
            return self.latest[1], False
        device, point = problem.q.device, problem.point
        tokens, own, queries = problem.prefix.k.shape[1], point.batch * point.n, point.batch * point.q_len
        task_of_key = torch.full((tokens + own,), -2, dtype=torch.int32, device=device)  # -2: nobody's
        for task, (start, m) in enumerate(problem.prefix.spans):
            task_of_key[start : start + m] = task
        counted, asked = (torch.arange(x, dtype=torch.int32, device=device) for x in (own, queries))
        row_of_key, time_of_key = torch.full_like(task_of_key, -2), torch.zeros_like(task_of_key)
        row_of_key[tokens:], time_of_key[tokens:] = counted // point.n, counted % point.n
        row_of_query = asked // point.q_len
        time_of_query = point.n - point.q_len + asked % point.q_len
        task_of_query = problem.task_ids[row_of_query]

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own_key = (row_of_key[key] == row_of_query[query]) & (time_of_key[key] <= time_of_query[query])
            return (task_of_key[key] == task_of_query[query]) | own_key

        def make() -> BlockMask:
            return create_block_mask(visible, None, None, queries, tokens + own, device=device)

        found: list[BlockMask] = []
        self.plan_us = elapsed_us(lambda: found.append(make()), device)
        self.latest = key, found[0]
        return found[0], True
