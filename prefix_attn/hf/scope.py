"""What the forward pass under way in a thread needs to know, where keywords do not reach; its first hook sets it."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor


class Scope:
    """What one thread's pass needs to know."""

    implementation: str | None = None  # the model's own, for a pass without tasks; None: a `RequestMask`
    batch: Any = None  # the `Batch` of a model that does not pass keywords on to its layers
    positions: Tensor | None = None  # the decoder's ``[batch, q_len]``, for a table that looks them up; None: its own
    recorded: Any = None  # where to note the attention calls of a pass without tasks, if anywhere
    replica: Any = None  # the `ReplicaCache` of a family served in the slow way
    without_cache = False  # whether its caller wants none


class _Threads(threading.local):
    def __init__(self) -> None:
        self.scope = Scope()


_threads = _Threads()


def scope() -> Scope:
    """This thread's. (At the end of each graph, what is compiled loses what it wrote to a `threading.local` itself.)"""
    return _threads.scope
