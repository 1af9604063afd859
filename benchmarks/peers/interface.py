"""What a way to compute a `Problem` must offer to be timed beside the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Problem


class Peer(ABC):
    """One provider of attention.

    Attributes:
        name, version: as they appear in the results.
        ours: whether it is this project's kernel, which must run and be right.
        replicates: whether it reads one copy of the prefix per row rather than one per task.
        with_prefix: whether it attends to the prefix; False for a call that shows what the prefix costs.
    """

    name: str
    version: str
    ours = False
    replicates = False
    with_prefix = True

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on this device at all; None if it can."""
        return None

    @abstractmethod
    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """The call to time. What a server would do once per request, or once per batch, is done here, untimed.

        The result of the call holds ``[B, H, Q, D]`` in that order of elements, in whatever shape; it reads nothing
        back to the host, so that it can be captured in a CUDA graph. Raises where the peer refuses the problem.
        """
