"""PyTorch's attention on a physical replica of the prefix: the copies are made once, untimed, and read at each call.

In decode the query heads of a kv head are packed into one query axis, so that each key is read once for all of them.
In prefill PyTorch's ``is_causal`` would align the mask top left; ``causal_lower_right`` aligns it where the prefix is
seen in full, without a mask in memory, in the kernels that know how; the others get the mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from .interface import Peer
from .problem import Problem

LABELS = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.MATH: "math",
}

#: Backends whose CUDA kernels align a causal mask at the bottom right by themselves.
LOWER_RIGHT = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class SdpaReplica(Peer):
    """One SDPA backend by name; it never falls back to another."""

    replicates = True

    def __init__(self, backend: SDPBackend) -> None:
        self.backend = backend
        self.name = f"sdpa {LABELS[backend]}, replica"
        self.version = f"torch {torch.__version__}"
        if backend == SDPBackend.CUDNN_ATTENTION:
            self.version += f", cudnn {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]

    def unavailable(self, device: torch.device) -> str | None:
        on_gpus_only = self.backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
        if on_gpus_only and device.type != "cuda":
            return f"PyTorch has it on GPUs only, not on {device.type!r}"
        return None

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        k, v = problem.replica
        q, mask, gqa = packed(problem, k)
        if problem.point.q_len > 1 and not problem.point.ragged and self.backend in LOWER_RIGHT and q.is_cuda:
            mask = causal_lower_right(q.shape[2], k.shape[2])

        def call() -> Tensor:
            with sdpa_kernel(self.backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)

        return call


def packed(problem: Problem, k: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """Queries, mask and ``enable_gqa`` for SDPA on the replica ``k``; in decode, the heads of a kv head are queries."""
    q = problem.q
    if problem.point.q_len == 1:
        return q.view(q.shape[0], k.shape[1], -1, q.shape[3]), problem.replica_mask, False  # [B, kv_heads, G, D]
    mask = lower_right_mask(q.shape[2], k.shape[2], q.device)
    return q, mask if problem.replica_mask is None else problem.replica_mask, problem.point.group > 1


def lower_right_mask(q_len: int, keys: int, device: torch.device) -> Tensor:
    """Bool ``[q_len, keys]``: query i sees key j when ``j <= keys - q_len + i``."""
    return torch.ones(q_len, keys, dtype=torch.bool, device=device).tril(diagonal=keys - q_len)
