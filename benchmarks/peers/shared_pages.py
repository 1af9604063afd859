"""The hard baseline: plain attention on physically shared pages, by a kernel of our own (paged_kernel.py).

Each row has a table of pages, in which the pages of a shared prefix are the same for all rows of the task: they are
held once and read once per row, mostly from the L2 cache. The kernel knows nothing about sharing: one pass over each
row's keys, split into chunks where there are few rows, query heads of a kv head in one tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .interface import OwnKernel
from .paging import Pages
from .problem import Point, Problem


class SharedPages(OwnKernel):
    """`paged_attention` with one page table per row."""

    name = "plain kernel, shared pages"

    def unsuited(self, point: Point) -> str | None:
        return None if point.q_len == 1 else "it is a decode kernel"

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        from .paged_kernel import paged_attention

        pages = Pages.of(problem, full_pages_only=True)
        k, v = (x.transpose(1, 2).contiguous() for x in (pages.k, pages.v))  # [pages, kv_heads, PAGE, D]
        tables, tokens = pages.row_tables(problem.task_ids.tolist())
        most = max(map(len, tables))
        padded = [pages + [0] * (most - len(pages)) for pages in tables]
        table, lengths = (torch.tensor(x, dtype=torch.int32, device=k.device) for x in (padded, tokens))
        q, scale = problem.q.contiguous(), problem.call.scale

        def call() -> Tensor:
            return paged_attention(q, k, v, table, lengths, scale)

        return call
