"""Launches bound by Triton itself, compiled for sm_90 but never run; prints the distinct kernels as JSON.

Run by test_compile.py in a process of its own, where kernels are not interpreted. No GPU is needed.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from benchmarks.pretended_gpu import pretend
from prefix_attn.kernels import backward, backward_dkv, backward_dq, decode, grouped, merge, prefill, row_tiles
from prefix_attn.kernels.launch import Operands
from prefix_attn.plan import TILE_ROWS, RowTiles
from prefix_attn.types import PrefixKV


class Compiled:
    """A kernel whose launches stop after compilation."""

    found: dict[str, list[Any]] = {}  # noqa: RUF012

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> None:
            kernel = self.kernel.warmup(grid=grid, **arguments)
            copies = re.findall(r"cp\.async\.c[ag][^;]*, 0x(\w+),", kernel.asm["ptx"])
            self.found[kernel.hash] = [kernel.name, sorted(set(copies))]

        return launch


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def operands(batch: int, kv_len: int, q_len: int, head_dim: int = 128, window: int | None = None) -> Operands:
    def sixteen_bits(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, head_dim, dtype=torch.bfloat16)

    k, prefix = sixteen_bits(batch, kv_len, 8).transpose(1, 2), sixteen_bits(8, 64)
    return Operands(
        q=sixteen_bits(batch, q_len, 32).transpose(1, 2), k=k, v=k,
        prefix=PrefixKV(prefix, prefix, integers(3), integers(3)), task_ids=integers(batch), kv_start=None,
        kv_len=integers(batch), causal=True, scale=0.1, window=window, softcap=None,
    )  # fmt: skip


def main() -> None:
    pretend(multiprocessors=4)  # so that the batches below are few programs, and many
    decode.decode_kernel = Compiled(decode.decode_kernel)
    merge.merge_kernel = Compiled(merge.merge_kernel)
    prefill.prefill_kernel = Compiled(prefill.prefill_kernel)
    grouped.grouped_kernel = Compiled(grouped.grouped_kernel)
    row_tiles.rank_kernel = Compiled(row_tiles.rank_kernel)
    row_tiles.members_kernel = Compiled(row_tiles.members_kernel)
    backward.delta_kernel = Compiled(backward.delta_kernel)
    backward_dq.backward_dq_kernel = Compiled(backward_dq.backward_dq_kernel)
    backward_dkv.backward_own_kernel = Compiled(backward_dkv.backward_own_kernel)
    backward_dkv.backward_bank_kernel = Compiled(backward_dkv.backward_bank_kernel)
    for kv_len, batch in ((100, 1), (128, 3), (1, 16), (4097, 2), (16, 1)):
        call = operands(batch, kv_len, 1)
        decode.decode_attention(call, torch.empty_like(call.q), None, chunks=1)
        call = operands(batch, kv_len, 1, window=kv_len)
        decode.decode_attention(call, torch.empty_like(call.q), None, chunks=3 + kv_len % 2)
        call = operands(batch, kv_len, 17 + kv_len)
        prefill.prefill_attention(call, torch.empty_like(call.q), torch.empty(1))
        lse = torch.empty(call.q.shape[:3])
        backward.attention_backward(call, call.q, lse, call.q, None, [True] * 5 + [False])
        row_tiles.row_tiles(integers(batch), integers(kv_len), 1 + batch, TILE_ROWS, kv_len)
        call, tiles = operands(batch, kv_len, 1), RowTiles(integers(batch), integers(1), integers(1, TILE_ROWS))
        grouped.grouped_attention(
            call, *tiles, torch.empty_like(call.q), None, max_len=kv_len, chunks=(2, 1 + kv_len % 2)
        )
    for kv_len in (99, 100):
        call = operands(2, kv_len, 1, head_dim=72)
        decode.decode_attention(call, torch.empty_like(call.q), None, chunks=1)
    print(json.dumps(list(Compiled.found.values())))


if __name__ == "__main__":
    main()
