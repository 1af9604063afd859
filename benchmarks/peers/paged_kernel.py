"""The kernel of `shared_pages`: decode over keys in pages, one query a row.

    out[b, h] = softmax_j(scale * q[b, h] . k_j) @ v_j          j: the tokens of row b's pages

Program = (row, kv head, key chunk); the GROUP query heads of a kv head are the rows of one tile, so each key is loaded
once for all of them, and each warp has keys of its own, as in kernels/decode.py. Few rows are split into chunks, which
`merge_chunks` joins.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.chunks import Residency, choose_chunks
from prefix_attn.kernels.config import TileConfig, cdiv, multiprocessors, padded_head_dim, slices
from prefix_attn.kernels.decode import FEW, MERGE_TILES
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, score_scales
from prefix_attn.kernels.merge import Partials, merge_chunks
from prefix_attn.kernels.primitives import (
    cast,
    dot,
    empty_state,
    join_slices,
    normalise,
    runtime_jit,
    slice_queries,
    softmax_update,
    tile_keys,
)


@runtime_jit
def paged_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, out_ptr, lse_ptr,
    stride_table, batch, chunks, scale_log2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """q, out ``[batch, KV_HEADS * GROUP, HEAD_DIM]``; k, v ``[pages, KV_HEADS, PAGE, HEAD_DIM]``; all contiguous.

    With SPLIT, out and lse are float32 ``[chunks, batch, heads(, HEAD_DIM)]``, lse in base 2.
    """
    # Rows vary fastest: programs that run together share a kv head, and so the prefixes in the L2 cache.
    pid = tl.program_id(0)
    b = pid % batch
    pid = pid // batch
    kv_head = pid % KV_HEADS
    chunk = pid // KV_HEADS

    offs_g = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    rows = (b.to(tl.int64) * KV_HEADS + kv_head) * GROUP + offs_g  # [BLOCK_M]
    mask_q = (offs_g < GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
    q = tl.load(q_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_D]

    length = tl.load(lengths_ptr + b)
    tiles = tl.cdiv(length, BLOCK_N)
    per_chunk = tl.cdiv(tiles, chunks)
    q = slice_queries(q, SLICES)
    acc, row_sum, row_max = empty_state(q)
    table_ptr += b.to(tl.int64) * stride_table
    for tile in tl.range(chunk * per_chunk, tl.minimum((chunk + 1) * per_chunk, tiles)):
        offs_n = tile * BLOCK_N + tile_keys(BLOCK_N, SLICES)  # [BLOCK_N] or [SLICES, keys], as the next three
        mask_n = offs_n < length
        page = tl.load(table_ptr + offs_n // PAGE, mask=mask_n, other=0).to(tl.int64)
        token = (page * KV_HEADS + kv_head) * PAGE + offs_n % PAGE
        places = tl.expand_dims(token, -1) * HEAD_DIM + offs_d  # [(SLICES,) keys, BLOCK_D]
        mask = tl.expand_dims(mask_n, -1) & (offs_d < HEAD_DIM)
        k = tl.load(k_ptr + places, mask=mask, other=0.0)
        scores = tl.where(tl.expand_dims(mask_n, -2), dot(q, tl.trans(k)), float("-inf"))  # [(SLICES,) BLOCK_M, keys]
        v = tl.load(v_ptr + places, mask=mask, other=0.0)
        acc, row_sum, row_max = softmax_update(acc, row_sum, row_max, scores, v, scale_log2, MASKED=True)

    acc, row_sum, row_max = join_slices(acc, row_sum, row_max)
    out, lse = normalise(acc, row_sum, row_max, False)
    if SPLIT:
        rows += chunk.to(tl.int64) * batch * KV_HEADS * GROUP
        tl.store(lse_ptr + rows, lse, mask=offs_g < GROUP)
    out_ptrs = out_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptrs, cast(out, out_ptr.dtype.element_ty), mask=mask_q)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Out ``[batch, q_heads, 1, head_dim]``.

    Args:
        q: ``[batch, q_heads, 1, head_dim]``, contiguous.
        k, v: ``[pages, kv_heads, page, head_dim]``, contiguous.
        table: int32 ``[batch, most pages]``; what lies beyond a row's tokens is not read.
        lengths: int32 ``[batch]``; tokens of each row.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads, page = k.shape[1], k.shape[2]
    programs = batch * kv_heads
    few = programs <= FEW * multiprocessors(q.device)
    config = tile_shape(heads // kv_heads, head_dim, q.element_size(), few)
    in_flight = replace(config, num_stages=(config.num_stages + 1) // 2)
    at_once = Residency.of("decode", in_flight, head_dim, q.dtype, q.device)
    chunks = choose_chunks(programs, cdiv(page * table.shape[1], config.block_n), at_once, MERGE_TILES)
    out = q.new_empty(q.shape)
    partials = Partials.empty(chunks, q, kv_heads=1) if chunks > 1 else None  # heads in their order
    paged_kernel[(programs * chunks,)](
        q_ptr=q, k_ptr=k, v_ptr=v, table_ptr=table, lengths_ptr=lengths,
        out_ptr=out if partials is None else partials.out, lse_ptr=None if partials is None else partials.lse,
        stride_table=table.stride(0), batch=batch, chunks=chunks, scale_log2=score_scales(scale, None)[0],
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim, PAGE=page, SPLIT=chunks > 1,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=padded_head_dim(head_dim),
        SLICES=slices(config.block_m, config.block_n, config.num_warps, head_dim, q.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages, **LAUNCH_OPTIONS,
    )  # fmt: skip
    if partials is not None:
        merge_chunks(partials, out, None, None, chunks)
    return out


def tile_shape(group: int, head_dim: int, itemsize: int, few: bool) -> TileConfig:
    """The tiles of kernels/decode.py, for few programs or many.

    The compiler gives half of the stages to the page table, whose loads come first: three or two are left for the keys.
    """
    block_m = max(16, triton.next_power_of_2(group))
    if itemsize == 4:
        return TileConfig(block_m, 32, 8, 2)
    if block_m == 16 and padded_head_dim(head_dim) in (64, 128) and not few:
        return TileConfig(16, 32, 2, 5 if head_dim > 64 else 7)
    return TileConfig(block_m, min(128, max(32, 8192 // padded_head_dim(head_dim))), 4, 7)
