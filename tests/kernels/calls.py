"""Kernel launches over the cases of the inherited suite, with tiles small enough that every edge is an edge of one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prefix_attn.backends import reference
from prefix_attn.checks import checked_call
from prefix_attn.kernels.config import TileConfig
from prefix_attn.kernels.decode import decode_attention
from prefix_attn.kernels.grouped import grouped_attention
from prefix_attn.kernels.prefill import prefill_attention
from prefix_attn.plan import row_tiles
from prefix_attn.types import AttentionCall, PrefixKV
from tests.cases import Inputs
from tests.tolerance import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)

#: How a call can be launched: the number of key chunks; of prefix and own ones; or None for the prefill kernel.
WAYS = {"decode": 1, "decode_split": 3, "grouped": (2, 2), "prefill": None}


def launch(call: AttentionCall, way: str, tile: TileConfig = TILE) -> tuple[Tensor, Tensor]:
    """Out and lse of one kernel; both start as NaN, so that an element nobody writes shows."""
    out = torch.full_like(call.q, float("nan"))
    lse = torch.full(call.q.shape[:3], float("nan"), device=call.q.device)
    chunks = WAYS[way]
    if chunks is None:
        prefill_attention(call, out, lse, config=tile)
    elif isinstance(chunks, tuple):
        tiles = row_tiles(call.task_ids, call.prefix.lens, call.q_len * call.group, tile.block_m)
        grouped_attention(call, *tiles, out, lse, max_len=100, config=tile, chunks=chunks)
    else:
        decode_attention(call, out, lse, config=tile, chunks=chunks)
    return out, lse


def check(inputs: Inputs, way: str, tile: TileConfig = TILE) -> None:
    """The kernel against the formula in float64, by the tolerance policy."""
    call = checked_call(*inputs.args, **inputs.options)
    out, lse = launch(call, way, tile)
    exact, eager = reference.attend(call, torch.float64), reference.attend(call, call.q.dtype)
    assert_close(f"out of {way}", out, eager[0], exact[0])
    assert_close(f"lse of {way}", lse, eager[1], exact[1])


def with_tasks(call: AttentionCall, task_ids: list[int], lens: Tensor | None = None) -> AttentionCall:
    """The call with task ids, and lens if given, that no check has seen."""
    prefix: PrefixKV = call.prefix if lens is None else replace(call.prefix, lens=lens)
    ids = torch.tensor(task_ids, dtype=torch.int32, device=call.q.device)
    return replace(call, task_ids=ids, prefix=prefix)
