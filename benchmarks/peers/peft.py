"""What PEFT does: one task per batch, so a mixed batch is run group by group, each with a cache of copies.

PEFT puts one copy of the prefix per row into a dynamic cache when a batch begins; from then on each step is
transformers' own. PEFT itself does no attention: what is timed is one layer of each group's model, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import torch
from packaging.version import Version
from torch import Tensor

from prefix_attn.bank.cache_argument import CACHE, OLD

from .hugging_face import HuggingFace, layer_step
from .problem import Problem


def peft_cannot_generate() -> str | None:
    """Why PEFT is no peer where whole models run; None where it is one."""
    if find_spec("peft") is None:
        return "PEFT is not installed (pip install 'prefix-attn[bench]')"
    if CACHE != OLD and Version(version("peft")) < Version("0.22"):
        return f"PEFT {version('peft')} loses its prefixes in transformers 5.24 (pip install 'transformers<5.24')"
    return None


class Peft(HuggingFace):
    """One layer's cache update and attention, group by group."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "peft, grouped by task"
        if find_spec("peft") is not None:
            self.version = f"peft {version('peft')}, {self.version}"

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        steps = []
        for rows, (start, m) in zip(groups(problem), problem.prefix.spans, strict=True):
            k, v = (
                torch.cat([prefix[None, :, start : start + m].expand(len(rows), -1, -1, -1), own[rows]], dim=2)
                for prefix, own in ((problem.prefix.k, problem.k), (problem.prefix.v, problem.v))
            )
            steps.append(layer_step(problem, problem.q[rows], k, v))

        def call() -> Tensor:
            return torch.cat([step() for step in steps])

        return call

    def in_batch_order(self, out: Tensor, problem: Problem) -> Tensor:
        order = torch.tensor([row for rows in groups(problem) for row in rows], device=out.device)
        return out.view(problem.q.shape)[order.argsort()]


def groups(problem: Problem) -> list[list[int]]:
    """The rows of each task."""
    rows: list[list[int]] = [[] for _ in range(problem.point.tasks)]
    for row, task in enumerate(problem.point.task_ids):
        rows[task].append(row)
    return rows
