"""One point of a benchmark, and the random tensors of one call at that point."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from prefix_attn.backends.reference import gather_prefix, visible
from prefix_attn.checks import checked_call
from prefix_attn.types import AttentionCall, PrefixKV


@dataclass(frozen=True)
class Point:
    """Sizes of a call: ``batch`` rows over ``tasks`` prefixes of ``m`` tokens, ``n`` own keys a row.

    In decode each row asks one query, in prefill n. Llama-3's heads by default.

    Attributes:
        skew: how rows are dealt to tasks: "even" in turn; "zipf", task t in proportion to 1 / (t + 1); "one big", every
            other task has one row. The last two in a random order; every task has at least one row.
        ragged: whether prefixes have from a quarter of m to m tokens, evenly spread, instead of m.
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
    skew: str = "even"
    ragged: bool = False

    @property
    def task_ids(self) -> list[int]:
        """The task of each row."""
        if self.skew == "even":
            return [b % self.tasks for b in range(self.batch)]
        spare, weights = self.batch - self.tasks, [1.0, *[0.0] * (self.tasks - 1)]
        if self.skew == "zipf":
            weights = [1 / (t + 1) for t in range(self.tasks)]
        bounds = [round(spare * sum(weights[: t + 1]) / sum(weights)) for t in range(self.tasks)]
        ids = [t for t in range(self.tasks) for _ in range(1 + bounds[t] - (bounds[t - 1] if t else 0))]
        random.Random(0).shuffle(ids)
        return ids

    @property
    def lens(self) -> list[int]:
        """Prefix tokens of each task."""
        if not self.ragged or self.tasks == 1:
            return [self.m] * self.tasks
        return [self.m * (self.tasks - 1 + 3 * t) // (4 * (self.tasks - 1)) for t in range(self.tasks)]

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
        if heads != (32, 8, 128, "bfloat16"):
            sizes += f" {'/'.join(map(str, heads))}"
        return sizes + (f" {self.skew}" if self.skew != "even" else "") + (" ragged" if self.ragged else "")


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
        prefixes = [(point.kv_heads, m, point.head_dim) for m in point.lens]
        return cls(
            point=point,
            q=2 * randn(point.batch, point.q_heads, point.q_len, point.head_dim),
            k=randn(*own),
            v=randn(*own),
            prefix=PrefixKV.pack([(randn(*shape), randn(*shape)) for shape in prefixes]),
            task_ids=torch.tensor(point.task_ids, dtype=torch.int32, device=device),
        )

    @cached_property
    def call(self) -> AttentionCall:
        """The call as the package sees it; what costs and references are computed from."""
        return checked_call(self.q, self.k, self.v, self.prefix, self.task_ids)

    @cached_property
    def replica(self) -> tuple[Tensor, Tensor]:
        """Keys and values with each row's own copy of its prefix in front: ``[B, kv_heads, m + n, D]`` x 2.

        Prefixes of different lengths are padded to the longest; `replica_mask` then says what is a key.
        """
        pk, pv, _ = gather_prefix(self.prefix, self.task_ids)
        return torch.cat([pk, self.k], dim=2), torch.cat([pv, self.v], dim=2)

    @cached_property
    def replica_mask(self) -> Tensor | None:
        """Which of the replica's keys each query sees, bool ``[B, 1, Q, m + n]``; None if prefixes are equally long."""
        if not self.point.ragged:
            return None
        lens = self.prefix.lens[self.task_ids.long()]
        return visible(self.call, int(lens.max()), lens)

    def append_newest(self, k: Tensor, v: Tensor) -> Callable[[], None]:
        """A call that writes the newest keys and values of all rows to the end of a preallocated cache.

        ``k`` and ``v`` are that cache, ``[B, kv_heads, any, D]``, and hold these values already.
        """
        new = self.point.q_len
        slots = [x[:, :, -new:] for x in (k, v)]
        newest = [x[:, :, -new:].clone() for x in (self.k, self.v)]

        def append() -> None:
            for slot, x in zip(slots, newest, strict=True):
                slot.copy_(x)

        return append

    @cached_property
    def without_prefix(self) -> Problem:
        """The same own keys and queries, with no row in any task; the bank holds one token that nobody reads."""
        one = PrefixKV.pack([(self.prefix.k[:, :1], self.prefix.v[:, :1])])
        return replace(self, prefix=one, task_ids=torch.full_like(self.task_ids, -1))
