"""What peers need that share a prefix by sorting the rows of the batch by task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import Peer
from .problem import Problem


@dataclass(frozen=True, eq=False)
class Sorted:
    """The rows of a problem, sorted by task.

    Attributes:
        order: int64 ``[batch]``; the row of the problem at each place.
        rows: how many rows each task has.
        lens: tokens of each task's prefix.
    """

    order: Tensor
    rows: list[int]
    lens: list[int]

    @classmethod
    def of(cls, problem: Problem) -> Sorted:
        """Reads task ids and lengths back to the host.

        Raises:
            ValueError: a row is without task, or a task without keys; these peers have no words for either.
        """
        ids, lens = problem.task_ids.tolist(), [m for _, m in problem.prefix.spans]
        if min(ids) < 0 or min(lens) < 1 or problem.k.shape[2] < 1:
            raise ValueError(
                "a row without task, without prefix or without keys of its own is more than it can express"
            )
        order = torch.argsort(problem.task_ids, stable=True)
        return cls(order, [ids.count(task) for task in range(len(lens))], lens)


class SortedRows(Peer):
    """A peer whose results come in the order of the tasks. A server would keep its batch so: sorting is not timed."""

    def in_batch_order(self, out: Tensor, problem: Problem) -> Tensor:
        place = torch.argsort(torch.argsort(problem.task_ids, stable=True))
        return out.reshape(problem.q.shape)[place]


def boundaries(counts: list[int], device: torch.device) -> Tensor:
    """int32 ``[len(counts) + 1]``: where each of consecutive pieces begins, and where the last ends."""
    return torch.tensor([0, *counts], device=device).cumsum(0, dtype=torch.int32)
