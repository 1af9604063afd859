"""Bytes that a call allocates at once, beyond what was there before: its temporaries and its result.

On a GPU, PyTorch's allocator knows. On a CPU it does not, so every tensor that an operator returns is counted from
then until its storage is freed; buffers that an operator keeps to itself (a few tiles a thread) are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def allocated_at_once(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that were allocated during the call, what was allocated before it not counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before: int = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        most: int = torch.cuda.max_memory_allocated(device)
        return most - before
    allocations = _Allocations()
    with allocations:
        call()
    return allocations.most


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators make while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: set[int] = set()
        self.now: int = 0
        self.most: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.known |= {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _freed(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size
