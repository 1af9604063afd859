"""One point of a benchmark, and the random tensors of one call at that point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from prefix_attn.backends.reference import gather_prefix
from prefix_attn.checks import checked_call
from prefix_attn.types import AttentionCall, PrefixKV


@dataclass(frozen=True)
class Point:
    """Sizes of a call: ``batch`` rows over ``tasks`` prefixes of ``m`` tokens, ``n`` own keys a row.

    In decode each row asks one query, in prefill n; row b belongs to task ``b % tasks``. Llama-3's heads by default.
    """

    op: str  # "decode" or "prefill"
    batch: int
    tasks: int
    m: int
    n: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def q_len(self) -> int:
        return 1 if self.op == "decode" else self.n

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.q_heads // self.kv_heads

    def __str__(self) -> str:
        """The point in words; Llama-3's heads in bfloat16 go without saying."""
        sizes = f"{self.op} B={self.batch} T={self.tasks} m={self.m} n={self.n}"
        heads = (self.q_heads, self.kv_heads, self.head_dim, self.dtype)
        return sizes if heads == (32, 8, 128, "bfloat16") else f"{sizes} {'/'.join(map(str, heads))}"


@dataclass(frozen=True, eq=False)
class Problem:
    """The inputs of one call: q ``[B, H, Q, D]``, k and v ``[B, kv_heads, n, D]``, the prefixes, task ids ``[B]``."""

    point: Point
    q: Tensor
    k: Tensor
    v: Tensor
    prefix: PrefixKV
    task_ids: Tensor

    @classmethod
    def random(cls, point: Point, device: torch.device, seed: int) -> Problem:
        """Fresh normal inputs; scores have a spread of two units, as a trained model's do."""
        rng = torch.Generator(device).manual_seed(seed)
        dtype: torch.dtype = getattr(torch, point.dtype)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device=device, dtype=dtype)

        own = (point.batch, point.kv_heads, point.n, point.head_dim)
        prefix = (point.kv_heads, point.m, point.head_dim)
        return cls(
            point=point,
            q=2 * randn(point.batch, point.q_heads, point.q_len, point.head_dim),
            k=randn(*own),
            v=randn(*own),
            prefix=PrefixKV.pack([(randn(*prefix), randn(*prefix)) for _ in range(point.tasks)]),
            task_ids=torch.arange(point.batch, dtype=torch.int32, device=device) % point.tasks,
        )

    @cached_property
    def call(self) -> AttentionCall:
        """The call as the package sees it; what costs and references are computed from."""
        return checked_call(self.q, self.k, self.v, self.prefix, self.task_ids)

    @cached_property
    def replica(self) -> tuple[Tensor, Tensor]:
        """Keys and values with each row's own copy of its prefix in front: ``[B, kv_heads, m + n, D]`` x 2."""
        pk, pv, _ = gather_prefix(self.prefix, self.task_ids)
        return torch.cat([pk, self.k], dim=2), torch.cat([pv, self.v], dim=2)

    @cached_property
    def without_prefix(self) -> Problem:
        """The same own keys and queries, with no row in any task; the bank holds one token that nobody reads."""
        one = PrefixKV.pack([(self.prefix.k[:, :1], self.prefix.v[:, :1])])
        return replace(self, prefix=one, task_ids=torch.full_like(self.task_ids, -1))
