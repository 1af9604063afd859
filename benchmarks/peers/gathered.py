"""A third way of decode, which the package does not have: a candidate, until it has been timed on a GPU.

Inline decode reads a prefix once per row, from the L2 cache, and grouped decode pays with partial results and a merge.
This one (gathered_kernel.py) reads it once for `ROWS` rows and needs no merge, but makes a quarter as many programs:
by the bytes it moves it should win where there are many rows and a prefix is short.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefix_attn.plan import row_tiles

from .interface import OwnKernel
from .problem import Point, Problem


class Gathered(OwnKernel):
    """`gathered_attention` with the batch's plan made beforehand."""

    name = "gathered decode (candidate)"

    def unsuited(self, point: Point) -> str | None:
        if point.q_len != 1:
            return "it is a way of decode"
        if point.dtype == "float32":
            return "its tiles are for 16-bit keys"
        if point.head_dim > 128 or point.group not in (1, 2, 4):
            return "its tiles are for head dims up to 128 and groups of 1, 2 and 4"
        if point.batch == 1 or point.m > 1024:
            return "it is meant for short prefixes that rows share"
        return None

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        from .gathered_kernel import ROWS, gathered_attention

        call = problem.call
        _, tasks, members = row_tiles(problem.task_ids, problem.prefix.lens, call.group, ROWS * call.group)

        def run() -> Tensor:
            out = torch.empty_like(call.q)
            gathered_attention(call, tasks, members, out)
            return out

        return run
