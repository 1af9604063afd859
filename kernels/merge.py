"""Join the partial results of the key chunks.

    top = max(max_c lse_c [, sink])     w_c = 2^(lse_c - top)     total = sum_c w_c [+ 2^(sink - top)]
    out = sum_c w_c out_c / total       lse = ln(2) (top + log2(total))       (partial lse in base 2, final in nats)

A chunk without keys has lse_c = -inf and out_c unwritten. No chunk with keys and no sink: out 0, lse -inf.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.config import padded_head_dim
from prefix_attn.kernels.direct_launch import Launcher
from prefix_attn.kernels.early_launch import early_options, wait_for_previous
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, LAYOUTS
from prefix_attn.kernels.primitives import LN_2, LOG2_E, cast, merge_weights, runtime_jit


@runtime_jit
def merge_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, sinks_ptr,
    stride_out_batch, stride_out_head, stride_out_seq, stride_out_dim,
    rows, batch, heads, group, q_len, chunks,
    HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``out[b, h, i] = sum_c w_c partial[c, b, h, i] / total``; program = one (b, h, i), all chunks in one tile."""
    wait_for_previous(EARLY)
    row = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    b, head, i = row // q_len // heads, row // q_len % heads, row % q_len
    partial_row = ((head // group * batch + b) * group + head % group) * q_len + i
    rows_c = offs_c.to(tl.int64) * rows + partial_row  # [BLOCK_C]
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E

    partial_lse = tl.load(partial_lse_ptr + rows_c, mask=offs_c < chunks, other=float("-inf"))
    weights, total, top = merge_weights(partial_lse, sink)
    mask = (weights > 0)[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_C, BLOCK_D]
    partial = tl.load(partial_ptr + rows_c[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
    seen = tl.where(total == 0, 1.0, total)
    out = tl.sum(partial * weights[:, None], 0) / seen  # [BLOCK_D]

    row_out = b.to(tl.int64) * stride_out_batch + head.to(tl.int64) * stride_out_head + i.to(tl.int64) * stride_out_seq
    out_ptrs = out_ptr + row_out + offs_d * stride_out_dim
    tl.store(out_ptrs, cast(out, out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(total == 0, float("-inf"), top + tl.log2(seen)) * LN_2)


class Partials(NamedTuple):
    """Partial results of key chunks: normalised ``out`` and base-2 ``lse``, which is -inf for a chunk without keys.

    float32, contiguous, ``[chunks, kv_heads, batch, group, q_len(, head_dim)]``: so the place of a query row follows
    from the number it has in a plan (prefix_attn/plan.py) without a division.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, chunks: int, q: Tensor, kv_heads: int) -> Partials:
        """For queries ``[batch, q_heads, q_len, head_dim]``."""
        batch, q_heads, q_len, head_dim = q.shape
        lse = q.new_empty((chunks, kv_heads, batch, q_heads // kv_heads, q_len), dtype=torch.float32)
        return cls(lse.new_empty((*lse.shape, head_dim)), lse)


def merge_chunks(partials: Partials, out: Tensor, lse: Tensor | None, sinks: Tensor | None, most_chunks: int) -> None:
    """Write out ``[batch, q_heads, q_len, head_dim]`` and lse.

    The order of summation follows from ``most_chunks``, not from how many chunks were launched.
    """
    chunks, _, _, group, _ = partials.lse.shape
    _launch(out.shape, out.stride(), out.device, chunks, group, most_chunks)(merge_kernel, {
        "partial_ptr": partials.out, "partial_lse_ptr": partials.lse, "out_ptr": out, "lse_ptr": lse,
        "sinks_ptr": sinks,
    })  # fmt: skip


@lru_cache(maxsize=LAYOUTS)
def _launch(
    shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device, chunks: int, group: int, most_chunks: int
) -> Launcher:
    """A launch of merge_kernel but for its tensors; ``shape``, ``strides`` and ``device`` are those of out."""
    batch, heads, q_len, head_dim = shape
    block_c, block_d = 1 << (most_chunks - 1).bit_length(), padded_head_dim(head_dim)
    return Launcher(batch * heads * q_len, {
        "stride_out_batch": strides[0], "stride_out_head": strides[1], "stride_out_seq": strides[2],
        "stride_out_dim": strides[3], "rows": batch * heads * q_len, "batch": batch, "heads": heads, "group": group,
        "q_len": q_len, "chunks": chunks, "HEAD_DIM": head_dim, "BLOCK_C": block_c, "BLOCK_D": block_d,
        "num_warps": merge_warps(block_c, block_d), **early_options(device), **LAUNCH_OPTIONS,
    })  # fmt: skip


def merge_warps(block_c: int, block_d: int) -> int:
    """Warps for a tile of partials: one while its threads can hold all chunks, since several must synchronise."""
    return max(1, min(4, block_c * block_d // 2048))
