"""Keys in pages, as a server holds them: pages of a prefix belong to all rows of its task, the others to one row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .problem import Problem

#: Tokens of a page: what FlashInfer and vLLM take by default.
PAGE = 16


@dataclass(frozen=True, eq=False)
class Pages:
    """The keys of one problem, copied once into pages.

    Attributes:
        k, v: ``[pages, PAGE, kv_heads, head_dim]``; 0 where a page is not full.
        shared: first page and tokens of each task.
        own: first page and tokens of each row.
    """

    k: Tensor
    v: Tensor
    shared: list[tuple[int, int]]
    own: list[tuple[int, int]]

    @classmethod
    def of(cls, problem: Problem, *, full_pages_only: bool) -> Pages:
        """Copy the keys; with ``full_pages_only`` the rest of a prefix goes to its rows' own pages.

        That is how one page table per row can hold both: only full pages can be shared.

        Raises:
            ValueError: a row has no task.
        """
        spans, ids = problem.prefix.spans, problem.task_ids.tolist()
        if min(ids) < 0:
            raise ValueError("a row has no task")
        pieces: list[tuple[Tensor, Tensor]] = []
        places: list[tuple[int, int]] = []
        pages = 0

        def append(k: Tensor, v: Tensor) -> None:  # [kv_heads, tokens, head_dim] x 2
            nonlocal pages
            tokens = k.shape[1]
            missing = -tokens % PAGE
            pieces.append((pad(k, (0, 0, 0, missing)), pad(v, (0, 0, 0, missing))))
            places.append((pages, tokens))
            pages += (tokens + missing) // PAGE

        rests = []
        for start, m in spans:
            pk, pv = (x[:, start : start + m] for x in (problem.prefix.k, problem.prefix.v))
            shared = m // PAGE * PAGE if full_pages_only else m
            append(pk[:, :shared], pv[:, :shared])
            rests.append((pk[:, shared:], pv[:, shared:]))
        for b, task in enumerate(ids):
            rest_k, rest_v = rests[task]
            append(torch.cat([rest_k, problem.k[b]], dim=1), torch.cat([rest_v, problem.v[b]], dim=1))
        k, v = (torch.cat(x, dim=1).transpose(0, 1).contiguous() for x in zip(*pieces, strict=True))
        shape = (pages, PAGE, *k.shape[1:])
        return cls(k.view(shape), v.view(shape), places[: len(spans)], places[len(spans) :])

    def row_tables(self, task_ids: list[int]) -> tuple[list[list[int]], list[int]]:
        """The page ids of each row, those of its task first, and how many tokens they hold together."""
        tables = [page_ids(self.shared[task]) + page_ids(self.own[b]) for b, task in enumerate(task_ids)]
        lengths = [self.shared[task][1] + self.own[b][1] for b, task in enumerate(task_ids)]
        return tables, lengths


def page_ids(place: tuple[int, int]) -> list[int]:
    """The pages of ``tokens`` tokens from page ``first`` on."""
    first, tokens = place
    return list(range(first, first + -(-tokens // PAGE)))
