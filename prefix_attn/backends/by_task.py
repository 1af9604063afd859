"""Attention over a prefix and over own keys computed apart: which rows read which prefix, and how the parts are joined.

Two parts with outputs ``o`` and log-sum-exps ``l`` (nats) make

    w = sigmoid(l1 - l2)          out = w o1 + (1 - w) o2          lse = log(exp(l1) + exp(l2))

and a sink with logit s a third part whose output is 0.

Source: arXiv:2402.05099 (shared-prefix decomposition), arXiv:1805.02867 (merging partial softmaxes).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.types import AttentionCall


class Readers(NamedTuple):
    """Rows with a prefix, sorted by task; on the CPU, whatever device is the default where they are first asked for."""

    groups: list[tuple[int, int, int]]  # (start of the prefix, its length, number of rows), task by task
    order: Tensor | None  # the rows, task by task; None: all rows of the batch, as they are

    def rows(self, call: AttentionCall) -> Tensor:
        """``order``, in full."""
        return torch.arange(call.batch, device="cpu") if self.order is None else self.order


def readers_in(call: AttentionCall) -> Readers:
    """Who reads which prefix in a call, whose task ids are on the host or waited for."""
    spans = call.prefix.spans
    return readers_of(tuple(spans[task] if task >= 0 else (0, 0) for task in call.task_ids.tolist()))


@lru_cache(maxsize=256)
def readers_of(spans: tuple[tuple[int, int], ...]) -> Readers:
    """The same, of each row's prefix: its start and its length, which is 0 for a row without."""
    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, span in enumerate(spans):
        if span[1] > 0:
            rows_of.setdefault(span, []).append(row)
    order = [row for rows in rows_of.values() for row in rows]
    in_place = order == list(range(len(spans)))
    return Readers(
        [(*span, len(rows)) for span, rows in rows_of.items()],
        None if in_place else torch.tensor(order, device="cpu"),
    )


def merge(own_out: Tensor, own_lse: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join a row's two parts in lse's dtype."""
    difference = own_lse - lse.clamp(min=torch.finfo(lse.dtype).min)  # a number, where neither part sees anything
    weight = torch.sigmoid(difference)[..., None]  # exp(own) / (exp(own) + exp(prefix))
    return torch.lerp(out.to(lse.dtype), own_out.to(lse.dtype), weight), torch.logaddexp(own_lse, lse)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Out ``[B, H, Q, D]`` and lse ``[B, H, Q]`` with a sink per head, ``[H]``, in the denominator."""
    joined = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    share = torch.exp(lse - joined.clamp(min=torch.finfo(lse.dtype).min))  # 0, where there is neither key nor sink
    return out * share[..., None], joined
