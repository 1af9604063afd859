"""The strongest way in plain PyTorch: a replica that is updated in place, then SDPA on packed query heads.

Each row's cache has room for its prefix, its own keys and those to come, so a step writes one key and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .interface import Peer
from .problem import Problem
from .sdpa import packed


class SdpaInPlace(Peer):
    """SDPA, by whichever backend PyTorch takes."""

    name = "sdpa, replica updated in place"
    version = f"torch {torch.__version__}"
    replicates = True

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        k, v = problem.replica
        append = problem.append_newest(k, v)
        q, mask, gqa = packed(problem, k)

        def call() -> Tensor:
            append()
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)

        return call
