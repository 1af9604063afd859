"""One model called from several threads at once, or with a bank that changes while it generates."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from torch import Tensor

import prefix_attn as pa


def wrong_in_threads(run: Callable[[str], Tensor], wanted: dict[str, Tensor], times: int = 4) -> list[str]:
    """Names of which ``run(name)`` gave something else than wanted, every name in a thread of its own."""

    def work(name: str) -> list[str]:
        return [name for _ in range(times) if not torch.equal(run(name), wanted[name])]

    with ThreadPoolExecutor(len(wanted)) as pool:
        return [name for wrong in pool.map(work, wanted) for name in wrong]


class ChangesTheBank(transformers.StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; at the second token it removes a task, replaces another, and makes the bank's memory grow."""

    def __init__(self, bank: pa.PrefixBank, tokens: int) -> None:
        self.bank = bank
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if input_ids.shape[1] == self.tokens + 2:
            values = [(k.repeat(1, 5, 1), v.repeat(1, 5, 1)) for k, v in self.bank.key_values("twelve")]
            self.bank.remove("five")
            self.bank.add("nine", values, replace=True)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
