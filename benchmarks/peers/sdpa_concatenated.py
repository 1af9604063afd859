"""One prefix per task, no replica: each step puts prefixes in front of the rows' keys, then calls SDPA.

What one writes first when prefixes must be held once; it pays with a copy of everything at every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prefix_attn.backends.reference import gather_prefix

from .interface import Peer
from .problem import Problem
from .sdpa import packed


class SdpaConcatenated(Peer):
    """Concatenate, then SDPA on packed query heads."""

    name = "sdpa, concatenated"
    version = f"torch {torch.__version__}"
    replicates = makes_replica = True

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        tasks = torch.arange(problem.point.tasks, device=problem.q.device)
        bank_k, bank_v, _ = (x.contiguous() for x in gather_prefix(problem.prefix, tasks))  # [T, kv_heads, m, D] x 2
        q, mask, gqa = packed(problem, problem.replica[0])
        pairs = ((bank_k, problem.k), (bank_v, problem.v))
        ids = problem.task_ids.long()

        def of_each_row(bank: Tensor) -> Tensor:
            return bank.expand(len(ids), -1, -1, -1) if len(bank) == 1 else bank[ids]

        def call() -> Tensor:
            k, v = (torch.cat([of_each_row(bank), own], dim=2) for bank, own in pairs)
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)

        return call
