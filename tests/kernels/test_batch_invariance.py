"""``batch_invariant``: a request has one output, bit for bit, in a thousand random batches.

Batches differ in size, the request's place, the tasks and lengths of the others, the bank around its prefix, how many
keys k can hold and how far the request's own are padded on the left.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from prefix_attn.kernels import decode, merge, prefill
from prefix_attn.kernels.launch import Operands
from prefix_attn.kernels.primitives import INTERPRETED
from prefix_attn.types import PrefixKV
from tests.kernels.calls import DEVICE, TILE

DIM = 16


class RowPrograms:
    """A kernel that, interpreted, runs the programs of one row and no others.

    Those write nothing that the row's read, and to interpret them would take an hour.
    """

    def __init__(self, kernel: Any, rows_vary_fastest: bool, batch: int, row: int) -> None:
        self.kernel, self.rows_vary_fastest, self.batch, self.row = kernel, rows_vary_fastest, batch, row

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        if not INTERPRETED.value:
            launch_all: Callable[..., None] = self.kernel[grid]
            return launch_all
        per_row, extra = divmod(grid[0], self.batch)
        assert not extra
        programs = [self.row + p * self.batch if self.rows_vary_fastest else self.row * per_row + p
                    for p in range(per_row)]  # fmt: skip

        def set_grid_idx(x: int, y: int, z: int) -> None:
            interpreter_builder.grid_idx = (programs[x], y, z)

        def launch(**arguments: Any) -> None:
            with mock.patch.object(interpreter_builder, "set_grid_idx", set_grid_idx):
                self.kernel[(per_row,)](**arguments)

        return launch


@dataclass
class Request:
    """One row with m prefix and n own keys; ``output`` puts it into a random batch and returns its bits."""

    m: int
    n: int
    q_len: int
    heads: int = 1
    window: int | None = None
    sinks: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.q = torch.randn(self.heads, self.q_len, DIM)
        self.k, self.v = torch.randn(2, 1, self.n, DIM)
        self.prefix = torch.randn(1, self.m, DIM), torch.randn(1, self.m, DIM)
        self.others = torch.randn(1, 16, DIM), torch.randn(1, 16, DIM)
        self.sink = torch.randn(self.heads) if self.sinks else None

    def output(self, alone: bool) -> bytes:
        rng = self.rng
        batch, capacity = (1, self.n) if alone else (rng.randint(1, 64), self.n + rng.randint(0, 30))
        # A window counts the pads between prefix and own keys, so that other pads are another request.
        row, pad = rng.randrange(batch), 0 if self.window else rng.randint(0, capacity - self.n)
        lens = [] if alone else [rng.randint(0, 16) for _ in range(rng.randint(0, 2))]
        task = rng.randint(0, len(lens))
        prefixes = [(self.others[0][:, :x], self.others[1][:, :x]) for x in lens]
        bank = PrefixKV.pack([*prefixes[:task], self.prefix, *prefixes[task:]])
        ids = [rng.randint(-1, len(lens)) for _ in range(batch)]
        ends = [rng.randint(0, capacity) for _ in range(batch)]
        starts = [rng.randint(0, end) for end in ends]
        ids[row], starts[row], ends[row] = task, pad, pad + self.n

        q, k, v = (torch.full((batch, heads, length, DIM), rng.choice([0.0, 1.0, float("nan")]))
                   for heads, length in ((self.heads, self.q_len), (1, capacity), (1, capacity)))  # fmt: skip
        q[row], k[row, :, pad : pad + self.n], v[row, :, pad : pad + self.n] = self.q, self.k, self.v
        out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"))
        return self.launch(q, k, v, bank, ids, starts, ends, out, lse, row)

    def launch(self, q: Tensor, k: Tensor, v: Tensor, bank: PrefixKV, ids: list[int], starts: list[int],
               ends: list[int], out: Tensor, lse: Tensor, row: int) -> bytes:  # fmt: skip
        q, k, v, out, lse = (x.to(DEVICE) for x in (q, k, v, out, lse))
        task_ids, kv_start, kv_len = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (ids, starts, ends))
        operands = Operands(
            q=q, k=k, v=v, prefix=PrefixKV(*(x.to(DEVICE) for x in (bank.k, bank.v, bank.starts, bank.lens))),
            task_ids=task_ids, kv_start=kv_start, kv_len=kv_len,
            sinks=None if self.sink is None else self.sink.to(DEVICE), causal=True, scale=0.25, window=self.window,
            softcap=None,
        )  # fmt: skip
        one_row = {"batch": q.shape[0], "row": row}
        with (
            mock.patch.object(decode, "decode_kernel", RowPrograms(decode.decode_kernel, True, **one_row)),
            mock.patch.object(merge, "merge_kernel", RowPrograms(merge.merge_kernel, False, **one_row)),
            mock.patch.object(prefill, "prefill_kernel", RowPrograms(prefill.prefill_kernel, False, **one_row)),
        ):
            if self.q_len > 4:
                prefill.prefill_attention(operands, out, lse, config=TILE)
            else:
                decode.decode_attention(operands, out, lse, batch_invariant=True, config=TILE)
        assert not out[row].isnan().any()
        return out[row].cpu().numpy().tobytes() + lse[row].cpu().numpy().tobytes()


@pytest.mark.parametrize(
    ("request_", "batches"),
    [
        (Request(m=5, n=60, q_len=1), 120),  # two chunks
        (Request(m=20, n=9, q_len=3, window=25, sinks=True), 80),
        (Request(m=5, n=9, q_len=8, heads=2), 800),
    ],
    ids=["decode", "few queries", "prefill"],
)
def test_one_output_in_a_thousand_batches(request_: Request, batches: int) -> None:
    alone = request_.output(alone=True)
    assert {request_.output(alone=False) for _ in range(batches)} == {alone}
