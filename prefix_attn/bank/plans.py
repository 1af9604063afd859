"""The plans of the latest batch, kept: every step of a generation asks for those of the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.plan import BatchPlan, recording

#: Plans by the device that layers are on.
Plans = dict[torch.device, BatchPlan]


class LatestPlans:
    """Plans of one part of a bank; for another batch or stream, or after a change of the bank, new ones are made."""

    def __init__(self) -> None:
        self._latest: tuple[_State, Plans] | None = None

    def of(self, task_ids: Tensor, lens: Mapping[torch.device, Tensor], distinct: int | None) -> Plans:
        """For task ids ``[batch]``, and the lengths of the prefixes on each device; ``distinct`` as in `BatchPlan`."""
        # In a graph the ids of each replay count, and tensors of the inference mode do not tell when they are written.
        if recording(task_ids) or any(x.is_inference() for x in (task_ids, *lens.values())):
            return _plans(task_ids, lens, distinct)
        state = _State.of(task_ids, *lens.values())
        latest = self._latest  # read once: another thread may write it
        if latest is None or not latest[0].same(state):
            self._latest = latest = state, _plans(task_ids, lens, distinct)
        return latest[1]


def _plans(task_ids: Tensor, lens: Mapping[torch.device, Tensor], distinct: int | None) -> Plans:
    return {device: BatchPlan(task_ids.to(device), x, distinct) for device, x in lens.items()}


class _State(NamedTuple):
    """What plans were made from, how often it had been written by then, and the streams that work them out."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    streams: tuple[int, ...]

    @classmethod
    def of(cls, *tensors: Tensor) -> _State:
        streams = (torch.cuda.current_stream(x.device).cuda_stream for x in tensors if x.is_cuda)
        return cls(tensors, tuple(x._version for x in tensors), tuple(streams))

    def same(self, other: _State) -> bool:
        return self[1:] == other[1:] and all(map(is_, self.tensors, other.tensors))
