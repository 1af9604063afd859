"""What a call must cost: bytes, FLOPs and the floor they set.

    bytes = e * (2 * kv_heads * D * (sum over tasks of m_t + sum over rows of n_b) + 2 * q_heads * D * rows * q_len)
    FLOPs = 4 * q_heads * D * sum over rows of (visible query-key pairs)

with e bytes an element, m_t the slots of a task's prefix that some query of its rows sees, n_b the row's own keys that
one of its queries sees: all, unless there is a window. A prefix counts once per task, not once per row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from prefix_attn.dispatch import BackendChoice
from prefix_attn.regime import Regime
from prefix_attn.types import AttentionCall


@dataclass(frozen=True)
class Roof:
    """What a device can sustain: bytes/s of its memory, FLOP/s of its matrix units."""

    bytes_per_s: float
    flops_per_s: float


#: Measured on random data: 8 GB device-to-device copy; 8192^3 bfloat16 matrix product.
ROOFS = {"NVIDIA H200": Roof(bytes_per_s=4.3e12, flops_per_s=790e12)}


@dataclass(frozen=True)
class Cost:
    """Bytes and FLOPs no implementation of the call can avoid, and the bytes a replicated prefix would take."""

    bytes: int
    flops: int
    bytes_replicated: int

    @classmethod
    def of(cls, call: AttentionCall) -> Cost:
        """Count for one call; reads task ids and lengths back to the host."""
        ids = call.task_ids.tolist()
        rows = _rows(call)
        longest: dict[int, int] = {}  # slots of each task that some row sees: those of all rows end together
        for t, row in zip(ids, rows, strict=True):
            longest[t] = max(longest.get(t, 0), row.slots)
        own = sum(row.own for row in rows)
        element = call.q.element_size()
        per_key = 2 * call.kv_heads * call.head_dim
        q_and_out = 2 * call.q_heads * call.head_dim * call.batch * call.q_len
        return cls(
            bytes=element * (per_key * (sum(longest.values()) + own) + q_and_out),
            flops=4 * call.q_heads * call.head_dim * sum(row.pairs for row in rows),
            bytes_replicated=element * (per_key * (sum(row.slots for row in rows) + own) + q_and_out),
        )

    def floor_us(self, roof: Roof) -> float:
        """Microseconds below which the call cannot run on a device with this roof."""
        return 1e6 * max(self.bytes / roof.bytes_per_s, self.flops / roof.flops_per_s)

    def saving(self, roof: Roof | None) -> float:
        """Predicted speed-up against a replicated prefix, both at their floor; the ratio of bytes without a roof."""
        if roof is None:
            return self.bytes_replicated / max(self.bytes, 1)
        replicated = replace(self, bytes=self.bytes_replicated)
        return replicated.floor_us(roof) / max(self.floor_us(roof), 1e-9)


class _Row(NamedTuple):
    """What a row's queries see: prefix slots and own keys that some query sees, and query-key pairs."""

    slots: int
    own: int
    pairs: int


def _rows(call: AttentionCall) -> list[_Row]:
    spans = call.prefix.spans
    kv_len = call.kv_len.tolist() if call.kv_len is not None else [call.kv_capacity] * call.batch
    kv_start = call.kv_start.tolist() if call.kv_start is not None else [0] * call.batch
    lens = [spans[t][1] if t >= 0 else 0 for t in call.task_ids.tolist()]
    # Rows of one shape see the same, and each shape takes a sum over queries.
    seen = {shape: _row(call, *shape) for shape in set(zip(lens, kv_start, kv_len, strict=True))}
    return [seen[shape] for shape in zip(lens, kv_start, kv_len, strict=True)]


def _row(call: AttentionCall, m: int, start: int, end: int) -> _Row:
    """A row with a prefix of ``m`` slots and own keys ``start .. end``.

    The first query sees the most slots. The own keys that some query sees begin with the first that it sees, and end
    with the row.
    """
    if call.q_len == 0:
        return _Row(0, 0, 0)
    past, window = end - call.q_len, call.window

    def slots(query: int) -> int:
        return m if window is None else min(m, max(0, window - 1 - query))

    def first(query: int) -> int:
        return start if window is None else max(start, query - window + 1)

    pairs = 0
    for query in range(past, end):
        last = min(end, query + 1) if call.causal else end
        pairs += slots(query) + max(0, last - first(query))
    return _Row(slots(past), max(0, end - first(past)), pairs)


@dataclass(frozen=True)
class Explanation:
    """What `prefix_attn.explain` found; ``print`` it."""

    backend: str
    reason: str
    regime: Regime | None
    device: str
    cost: Cost
    floor_us: float | None
    saving: float

    @classmethod
    def of(cls, call: AttentionCall, choice: BackendChoice) -> Explanation:
        device = torch.cuda.get_device_name(call.q.device) if call.q.is_cuda else call.q.device.type
        cost, roof = Cost.of(call), ROOFS.get(device)
        floor_us = cost.floor_us(roof) if roof else None
        return cls(choice.name, choice.reason, choice.regime, device, cost, floor_us, cost.saving(roof))

    def __str__(self) -> str:
        c = self.cost
        floor = f"unknown: no roof measured for {self.device}" if self.floor_us is None else f"{self.floor_us:.1f} us"
        of = "in bytes" if self.floor_us is None else "at the floor of both"
        regime = f"regime    {self.regime.name} ({self.regime.reason})\n" if self.regime else ""
        return (
            f"backend   {self.backend} ({self.reason})\n"
            f"{regime}"
            f"device    {self.device}\n"
            f"bytes     {c.bytes:,} (a replicated prefix: {c.bytes_replicated:,})\n"
            f"FLOPs     {c.flops:,}\n"
            f"floor     {floor}\n"
            f"saving    {self.saving:.2f}x against a replicated prefix, {of}"
        )
