"""Prefill: tiles of many queries, each with one accumulator over its row's prefix and own keys; there is no merge.

    out = softmax(scale * q @ [pk; k]^T + mask) @ [pv; v]          lse in nats; a query that sees nothing: 0 and -inf

Program = (tile of query rows, kv head, row). The rows of a tile are BLOCK_M / G consecutive queries times the G query
heads of the kv head. Key tiles that every query of the tile sees in full go through a loop without any mask: those of
the prefix, then own ones. A second loop takes the edges, in tiles of BLOCK_E: the end of the prefix, the causal
diagonal, and what a window cuts through. Tiles that no query sees (padding on the left, above the diagonal, outside the
window) are in neither: own tiles are counted from the first visible key, wherever it lies.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from functools import lru_cache

import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.config import TileConfig, cdiv, edge_keys, padded_head_dim
from prefix_attn.kernels.direct_launch import Launcher
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, LAYOUTS, Layout, Operands, contiguous
from prefix_attn.kernels.primitives import (
    LN_2,
    LOG2_E,
    add_sink,
    again,
    attend_tile,
    cast,
    empty_state,
    normalise,
    open_bias,
    open_row,
    query_rows,
    runtime_jit,
    tile_of_program,
)
from prefix_attn.kernels.spans import edge_tile, full_tile, split_row


@runtime_jit
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, task_ids_ptr, starts_ptr, lens_ptr, kv_start_ptr, kv_len_ptr,
    sinks_ptr, bias_ptr, out_ptr, lse_ptr,
    stride_q_batch, stride_q_head, stride_q_seq, stride_q_dim,
    stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
    stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
    stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
    stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
    stride_out_batch, stride_out_head, stride_out_seq, stride_out_dim,
    stride_task_ids, stride_kv_start, stride_kv_len, stride_bias_head, stride_bias_entry,
    kv_heads, q_len, kv_capacity, num_tasks, query_tiles, window, scale_log2, softcap_inner,
    bias_reach, bias_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, CAUSAL: tl.constexpr, BIAS_OF_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out[b, h, i] = softmax_j(s_ij) @ v_j`` over all keys j of row b, for BLOCK_M pairs (i, h)."""
    query_tile, kv_head, b = tile_of_program(query_tiles, kv_heads)
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
    prefix, own = split_row(first, last, own_start, own_end, prefix_len, window, CAUSAL, BLOCK_N, BLOCK_E)

    acc, row_sum, row_max = empty_state(q)

    for n in tl.range(0, prefix[3] + own[3]):
        is_own, start = full_tile(n, prefix, own, BLOCK_N, BLOCK_E)
        acc, row_sum, row_max = attend_tile(
            acc, row_sum, row_max, q, query, start, own[1], prefix[1], prefix_len, is_own, own_keys, prefix_keys,
            window, scale_log2, softcap_inner, bias, MASKED=False, CAUSAL=CAUSAL, HEAD_DIM=HEAD_DIM, ALIGN=ALIGN,
            BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)  # fmt: skip

    for n in tl.range(0, prefix[2] + prefix[4] + own[2] + own[4]):
        is_own, start = edge_tile(n, prefix, own, BLOCK_N, BLOCK_E)
        acc, row_sum, row_max = attend_tile(
            acc, row_sum, row_max, q, query, start, own[1], prefix[1], prefix_len, is_own, own_keys, prefix_keys,
            window, scale_log2, softcap_inner, bias, MASKED=True, CAUSAL=CAUSAL, HEAD_DIM=HEAD_DIM, ALIGN=ALIGN,
            BLOCK_N=BLOCK_E, BLOCK_D=BLOCK_D)  # fmt: skip

    offs_i, offs_h, mask_m = query_rows(again(query_tile), kv_head, q_len, GROUP, BLOCK_M)
    i64, h64 = offs_i.to(tl.int64), offs_h.to(tl.int64)
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + offs_h, mask=mask_m, other=0.0).to(tl.float32) * LOG2_E  # [BLOCK_M]
        acc, row_sum, row_max = add_sink(acc, row_sum, row_max, sink)
    out, lse = normalise(acc, row_sum, row_max, broken)
    if lse_ptr is not None:
        tl.store(lse_ptr + (b64 * kv_heads * GROUP + h64) * q_len + i64, lse * LN_2, mask=mask_m)
    rows_out = (b64 * stride_out_batch + h64 * stride_out_head + i64 * stride_out_seq) * ALIGN  # [BLOCK_M]
    out_ptrs = out_ptr + rows_out[:, None] + offs_d[None, :] * stride_out_dim
    tl.store(out_ptrs, cast(out, out_ptr.dtype.element_ty), mask=mask_q)


def prefill_attention(operands: Operands, out: Tensor, lse: Tensor | None, config: TileConfig | None = None) -> None:
    """Write out, and lse (float32 ``[batch, q_heads, q_len]``, contiguous) if given."""
    operands = operands.scaled
    _launch(operands.layout, out.stride(), config)(prefill_kernel, {
        **operands.tensors(), "sinks_ptr": contiguous(operands.sinks), "bias_ptr": operands.relative_bias,
        "out_ptr": out, "lse_ptr": lse,
    })  # fmt: skip


@lru_cache(maxsize=LAYOUTS)
def _launch(layout: Layout, out: tuple[int, ...], config: TileConfig | None) -> Launcher:
    """A launch of prefill_kernel but for its tensors; ``out`` are the strides of the output."""
    batch, _, q_len, head_dim = layout.q_shape
    config = config or layout.config("prefill")
    query_tiles = cdiv(q_len * layout.group, config.block_m)
    return Launcher(query_tiles * layout.k_shape[1] * batch, {
        **layout.arguments(out=out), "query_tiles": query_tiles,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_E": edge_keys(config.block_n), "BLOCK_D": padded_head_dim(head_dim),
        "num_warps": config.num_warps, "num_stages": config.num_stages, **LAUNCH_OPTIONS,
    })  # fmt: skip
