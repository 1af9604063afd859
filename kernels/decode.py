"""Inline decode: few queries a row, each row's prefix read in the same loop as its own keys.

    out = softmax(scale * q @ [pk; k]^T + mask) @ [pv; v]          lse in nats; a query that sees nothing: 0 and -inf

Program = (row, kv head, tile of query rows, key chunk). The G query heads of a kv head times the row's queries are
the rows of one tile, so each key is loaded once for all of them. One numbering covers the tiles of prefix and own keys,
with those of the prefix spread among the own; chunk c begins at tile ``c * per_chunk``, where ``per_chunk`` follows
from the row alone. A short prefix thus costs neither a launch nor a merge, and a long one is split like any other keys.

Where a tile has 16 rows, each warp attends to a slice of its keys by itself, and the slices' states are joined once, at
the end: warps that shared all keys would synchronise for the maximum, the sum and the weights of every tile.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.chunks import Residency, choose_chunks
from prefix_attn.kernels.config import TileConfig, cdiv, decode_rows, multiprocessors, padded_head_dim, slices
from prefix_attn.kernels.direct_launch import Launcher
from prefix_attn.kernels.early_launch import early_options, let_next_begin, wait_for_previous
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, LAYOUTS, Layout, Operands, contiguous
from prefix_attn.kernels.merge import Partials, merge_chunks
from prefix_attn.kernels.primitives import (
    LN_2,
    LOG2_E,
    add_sink,
    again,
    attend_tile,
    cast,
    empty_state,
    join_slices,
    normalise,
    open_bias,
    open_row,
    partial_rows,
    query_rows,
    runtime_jit,
    slice_queries,
)
from prefix_attn.kernels.spans import visible_span

#: The fewest tiles of a chunk.
MIN_TILES = 2

#: With batch_invariant: the chunks of a long row, which with its kv heads are enough to fill a GPU, and the fewest
#: tiles of a chunk, which are more than MIN_TILES since short rows are split too.
INVARIANT_CHUNKS, INVARIANT_TILES = 16, 8

#: A batch has few programs up to FEW per multiprocessor; a merge costs the time of MERGE_TILES tiles. Both are fitted
#: to sweeps on an H200 (kernels/README.md).
FEW, MERGE_TILES = 2, 2.5


@runtime_jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, task_ids_ptr, starts_ptr, lens_ptr, kv_start_ptr, kv_len_ptr,
    sinks_ptr, bias_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    stride_q_batch, stride_q_head, stride_q_seq, stride_q_dim,
    stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
    stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
    stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
    stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
    stride_out_batch, stride_out_head, stride_out_seq, stride_out_dim,
    stride_task_ids, stride_kv_start, stride_kv_len, stride_bias_head, stride_bias_entry,
    batch, kv_heads, q_len, kv_capacity, num_tasks, query_tiles, chunks,
    window, scale_log2, softcap_inner, bias_reach, bias_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    BIAS_OF_SLOTS: tl.constexpr,
    MIN_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SLICES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``out[b, h, i] = softmax_j(s_ij) @ v_j`` over one chunk of the keys j of row b.

    With SPLIT, the results go to partial and partial_lse (`prefix_attn.kernels.merge.Partials`), and merge_kernel
    finishes; out and lse are not used. Without, it is the other way round.

    Strides are in units of ALIGN elements (`launch.stride_arguments`). A row in error (`load_row`) is ``broken``: it
    has no keys, and becomes NaN. BIAS_OF_SLOTS: a relative bias counts from the end of the slots, not of the keys.
    """
    wait_for_previous(EARLY)
    if SPLIT:
        let_next_begin(EARLY)
    # Rows vary fastest: programs that run together share a kv head, and so the prefixes in the L2 cache.
    pid = tl.program_id(0)
    b = pid % batch
    pid = pid // batch
    kv_head = pid % kv_heads
    pid = pid // kv_heads
    query_tile = pid % query_tiles
    chunk = pid // query_tiles

    offs_i, offs_h, mask_m = query_rows(query_tile, kv_head, q_len, GROUP, BLOCK_M)  # [BLOCK_M] x 3
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
    b64, i64, h64 = b.to(tl.int64), offs_i.to(tl.int64), offs_h.to(tl.int64)
    rows_q = (b64 * stride_q_batch + h64 * stride_q_head + i64 * stride_q_seq) * ALIGN  # [BLOCK_M]
    q = tl.load(q_ptr + rows_q[:, None] + offs_d[None, :] * stride_q_dim, mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_D]

    own_keys, prefix_keys, own_start, own_end, prefix_len, broken = open_row(
        b, kv_head, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr,
        task_ids_ptr, starts_ptr, lens_ptr, kv_start_ptr, kv_len_ptr,
        stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
        stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
        stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
        stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
        stride_task_ids, stride_kv_start, stride_kv_len, kv_capacity, num_tasks, ALIGN)  # fmt: skip
    past = own_end - q_len
    query = past + offs_i  # [BLOCK_M]
    # Without causal, keys past kv_len are padding behind the row: positions count from the end of the slots.
    bias = open_bias(bias_ptr, stride_bias_head, stride_bias_entry, bias_reach, bias_scale, offs_h[:, None],
                     (kv_capacity - q_len + offs_i if BIAS_OF_SLOTS else query)[:, None])  # fmt: skip
    first = past + query_tile * BLOCK_M // GROUP
    last = past + tl.minimum((query_tile * BLOCK_M + BLOCK_M - 1) // GROUP, q_len - 1)
    prefix_lo, prefix_hi, _, _ = visible_span(
        0, prefix_len, first + prefix_len, last + prefix_len, window, False)  # fmt: skip
    own_lo, own_hi, _, _ = visible_span(own_start, own_end, first, last, window, CAUSAL)

    prefix_tiles = tl.cdiv(prefix_hi - prefix_lo, BLOCK_N)
    own_tiles = tl.cdiv(own_hi - own_lo, BLOCK_N)
    tiles = prefix_tiles + own_tiles
    # Every period-th tile is one of the prefix until none is left: it comes from the cache, own tiles from memory.
    period = own_tiles // tl.maximum(prefix_tiles, 1) + 1
    per_chunk = tl.maximum(tl.cdiv(tiles, chunks), MIN_TILES) if SPLIT else tiles
    first_tile = chunk * per_chunk
    last_tile = tl.minimum(first_tile + per_chunk, tiles)

    q = slice_queries(q, SLICES)
    acc, row_sum, row_max = empty_state(q)
    for tile in tl.range(first_tile, last_tile):
        turn = tile // period  # prefix tiles before this one, while some are left
        own = (turn >= prefix_tiles) | (tile % period < period - 1)
        start = tl.where(own, own_lo + (tile - tl.minimum(turn, prefix_tiles)) * BLOCK_N, prefix_lo + turn * BLOCK_N)
        acc, row_sum, row_max = attend_tile(
            acc, row_sum, row_max, q, query, start, own_hi, prefix_hi, prefix_len, own, own_keys, prefix_keys, window,
            scale_log2, softcap_inner, bias, MASKED=True, CAUSAL=CAUSAL, HEAD_DIM=HEAD_DIM, ALIGN=ALIGN,
            BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, SLICES=SLICES)  # fmt: skip
    acc, row_sum, row_max = join_slices(acc, row_sum, row_max)

    offs_i, offs_h, mask_m = query_rows(again(query_tile), kv_head, q_len, GROUP, BLOCK_M)
    i64, h64 = offs_i.to(tl.int64), offs_h.to(tl.int64)
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
    if SPLIT:
        out, lse = normalise(acc, row_sum, row_max, broken)
        places = partial_rows(chunk, kv_head, b, offs_h % GROUP, offs_i, kv_heads, batch, q_len, GROUP)  # [BLOCK_M]
        tl.store(partial_lse_ptr + places, lse, mask=mask_m)
        # Most chunks of a short row are empty; the merge never reads the out of those.
        mask_out = mask_q & (lse != float("-inf"))[:, None]
        tl.store((partial_ptr + places * HEAD_DIM)[:, None] + offs_d[None, :], out, mask=mask_out)
    else:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + offs_h, mask=mask_m, other=0.0).to(tl.float32) * LOG2_E  # [BLOCK_M]
            acc, row_sum, row_max = add_sink(acc, row_sum, row_max, sink)
        out, lse = normalise(acc, row_sum, row_max, broken)
        if lse_ptr is not None:
            tl.store(lse_ptr + (b64 * kv_heads * GROUP + h64) * q_len + i64, lse * LN_2, mask=mask_m)
        rows_out = (b64 * stride_out_batch + h64 * stride_out_head + i64 * stride_out_seq) * ALIGN  # [BLOCK_M]
        out_ptrs = out_ptr + rows_out[:, None] + offs_d[None, :] * stride_out_dim
        tl.store(out_ptrs, cast(out, out_ptr.dtype.element_ty), mask=mask_q)


def decode_attention(
    operands: Operands,
    out: Tensor,
    lse: Tensor | None,
    *,
    batch_invariant: bool = False,
    config: TileConfig | None = None,
    chunks: int | None = None,
) -> None:
    """Write out, and lse (float32 ``[batch, q_heads, q_len]``, contiguous) if given.

    The number of key chunks follows from shapes alone: nothing is read back from the device. With batch_invariant it
    is a constant, so that a row's chunks, and with them its bits, depend neither on the rest of the batch nor on how
    many keys k could hold.
    """
    operands = operands.scaled
    sinks = contiguous(operands.sinks)
    launch = _launch(operands.layout, out.stride(), batch_invariant, config, chunks)
    partials = Partials.empty(launch.launched, operands.q, operands.kv_heads) if launch.chunks > 1 else None
    launch.run(decode_kernel, {
        **operands.tensors(), "sinks_ptr": sinks, "bias_ptr": operands.relative_bias, "out_ptr": out,
        "lse_ptr": lse, "partial_ptr": None if partials is None else partials.out,
        "partial_lse_ptr": None if partials is None else partials.lse,
    })  # fmt: skip
    if partials is not None:
        merge_chunks(partials, out, lse, sinks, launch.chunks)


class _Launch(NamedTuple):
    run: Launcher
    chunks: int  # of a row, as its keys are cut
    launched: int  # those of them that a row can reach


@lru_cache(maxsize=LAYOUTS)
def _launch(
    layout: Layout, out: tuple[int, ...], batch_invariant: bool, config: TileConfig | None, chunks: int | None
) -> _Launch:
    """A launch of decode_kernel but for its tensors; ``out`` are the strides of the output."""
    (batch, _, q_len, head_dim), (_, kv_heads, kv_capacity, _) = layout.q_shape, layout.k_shape
    rows = q_len * layout.group
    if config is None:
        # A row's bits depend on the tile config: batch_invariant takes the same one for every batch.
        programs = batch * kv_heads * cdiv(rows, decode_rows(rows))
        few = programs <= FEW * multiprocessors(layout.device) and not batch_invariant
        config = layout.config("decode_few" if few else "decode", rows)
    query_tiles = cdiv(rows, config.block_m)
    programs = batch * kv_heads * query_tiles
    if chunks is None and batch_invariant:
        chunks = INVARIANT_CHUNKS
    if chunks is None:
        # The tiles of a row, estimated from shapes: those of all own slots, and of a mean prefix.
        prefix = layout.prefix_tokens // max(1, layout.num_tasks)
        tiles = cdiv(kv_capacity, config.block_n) + cdiv(prefix, config.block_n)
        at_once = Residency.of("decode", config, head_dim, layout.dtype, layout.device)
        chunks = choose_chunks(programs, tiles, at_once, MERGE_TILES)
    # Every chunk has at least these tiles, so no row has keys in a chunk that is not launched.
    least_tiles = INVARIANT_TILES if batch_invariant else MIN_TILES
    most_tiles = cdiv(kv_capacity, config.block_n) + cdiv(layout.prefix_tokens, config.block_n)
    launched = max(1, min(chunks, cdiv(most_tiles, least_tiles)))
    arguments = {
        **layout.arguments(out=out), "batch": batch, "query_tiles": query_tiles, "chunks": chunks,
        "SPLIT": chunks > 1, "MIN_TILES": least_tiles,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": padded_head_dim(head_dim),
        "SLICES": slices(config.block_m, config.block_n, config.num_warps, head_dim, layout.dtype),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
        **early_options(layout.device), **LAUNCH_OPTIONS,
    }  # fmt: skip
    return _Launch(Launcher(programs * launched, arguments), chunks, launched)
