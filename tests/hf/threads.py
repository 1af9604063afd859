"""One model called from several threads at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def wrong_in_threads(run: Callable[[str], Tensor], wanted: dict[str, Tensor], times: int = 4) -> list[str]:
    """Names of which ``run(name)`` gave something else than wanted, every name in a thread of its own."""

    def work(name: str) -> list[str]:
        return [name for _ in range(times) if not torch.equal(run(name), wanted[name])]

    with ThreadPoolExecutor(len(wanted)) as pool:
        return [name for wrong in pool.map(work, wanted) for name in wrong]
