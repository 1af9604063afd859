"""What a way to compute a `Problem` must offer to be timed beside the others."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from prefix_attn.kernels.device import interpreting

from .problem import Point, Problem


class Peer(ABC):
    """One provider of attention.

    Attributes:
        name, version: as they appear in the results.
        ours: whether it is this project's kernel, which must run and be right.
        replicates: whether it reads one copy of the prefix per row rather than one per task.
        makes_replica: whether each call makes these copies, from one per task, rather than finding them.
        with_prefix: whether it attends to the prefix; False for a call that shows what the prefix costs.
        plan_us: host and device time of what the latest `prepare` worked out once for all layers of a batch.
        compile_s: seconds that the latest `prepare` spent on compilation, if it compiles for each shape.
    """

    name: str
    version: str
    ours = False
    replicates = False
    makes_replica = False
    with_prefix = True
    plan_us: float | None = None
    compile_s: float | None = None

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on this device at all; None if it can."""
        return None

    def unsuited(self, point: Point) -> str | None:
        """Why it is not timed at this point; None if it is."""
        return None

    def in_batch_order(self, out: Tensor, problem: Problem) -> Tensor:
        """The result of a call with its rows in the problem's order; some peers want theirs sorted by task."""
        return out

    @abstractmethod
    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """The call to time. What a server would do once per request, or once per batch, is done here, untimed.

        The result of the call holds ``[B, H, Q, D]`` in that order of elements, in whatever shape; it reads nothing
        back to the host, so that it can be captured in a CUDA graph. Raises where the peer refuses the problem.
        """


class OwnKernel(Peer):
    """A Triton kernel of ours that is no part of the package: a baseline, or a candidate."""

    def __init__(self) -> None:
        self.version = f"ours, triton {version('triton')}" if find_spec("triton") else "ours"

    def unavailable(self, device: torch.device) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed"
        if device.type != "cuda" and not interpreting():
            return f"Triton runs on GPUs, not on {device.type!r}"
        return None


def elapsed_us(work: Callable[[], object], device: torch.device) -> float:
    """Microseconds until ``work`` is done on the host and on the device, by the host's clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e6 * (time.perf_counter() - start)
