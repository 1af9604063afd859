"""Gradient of the queries: tiles of queries, each over its row's prefix and its own keys, as in prefill.

    dx_ij = p_ij (dout_i . v_j - delta_i)     [times 1 - tanh^2 with a softcap]          dq_i = scale * sum_j dx_ij k_j

with ``p = 2^(s - lse)`` computed again from the scores s and lse (base 2), and ``delta = dout . out - dlse``. A query
that sees nothing, and a row whose task id or bounds are an error, get 0.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.config import TileConfig, cdiv, padded_head_dim
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, Operands, backward_scales, strided
from prefix_attn.kernels.primitives import (
    NO_LIMIT,
    again,
    cast,
    dot,
    finish_scores,
    load_keys,
    open_bias,
    open_row,
    query_rows,
    runtime_jit,
    score_gradients,
    select_keys,
    tile_of_program,
    visible_keys,
)
from prefix_attn.kernels.spans import edge_tile, full_tile, split_row


@triton.jit
def add_keys(dq, q, do, lse, delta, query, start, own, own_end, prefix_end, prefix_len, own_keys, prefix_keys,
             window, scale_log2, softcap_inner, bias,
             MASKED: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """``dq + dx @ k`` for the keys ``start .. start + BLOCK_N``; the other arguments as in `attend_tile`."""
    keys, end, key_shift = select_keys(own, own_end, prefix_end, prefix_len, own_keys, prefix_keys)
    k = load_keys(keys[0], keys[2], keys[3], start, end, MASKED, HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D)
    v = load_keys(keys[1], keys[4], keys[5], start, end, MASKED, HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D)
    key = (start - key_shift + tl.arange(0, BLOCK_N))[None, :]  # [1, BLOCK_N]
    scores = finish_scores(dot(q, tl.trans(k)), softcap_inner, bias, key, q.dtype == tl.float32)  # [BLOCK_M, BLOCK_N]
    dp = dot(do, tl.trans(v))  # [BLOCK_M, BLOCK_N]
    _, dx = score_gradients(scores, dp, lse[:, None], delta[:, None], scale_log2, softcap_inner)
    if MASKED:
        first = query + key_shift - window + 1 if window is not None else None  # [BLOCK_M]
        last = tl.where(own, query, NO_LIMIT) if CAUSAL else None  # [BLOCK_M]
        dx = tl.where(visible_keys(start, end, first, last, BLOCK_N), dx, 0.0)
    return dot(cast(dx, k.dtype), k, dq)


@runtime_jit
def backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr,
    task_ids_ptr, starts_ptr, lens_ptr, kv_start_ptr, kv_len_ptr, bias_ptr,
    stride_q_batch, stride_q_head, stride_q_seq, stride_q_dim,
    stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
    stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
    stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
    stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
    stride_do_batch, stride_do_head, stride_do_seq, stride_do_dim,
    stride_dq_batch, stride_dq_head, stride_dq_seq, stride_dq_dim,
    stride_task_ids, stride_kv_start, stride_kv_len, stride_bias_head, stride_bias_entry,
    kv_heads, q_len, kv_capacity, num_tasks, query_tiles, window, scale, scale_log2, softcap_inner,
    bias_reach, bias_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, CAUSAL: tl.constexpr, BIAS_OF_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``dq[b, h, i] = scale * sum_j dx_ij k_j`` over all keys j of row b, for BLOCK_M pairs (i, h)."""
    query_tile, kv_head, b = tile_of_program(query_tiles, kv_heads)
    offs_i, offs_h, mask_m = query_rows(query_tile, kv_head, q_len, GROUP, BLOCK_M)  # [BLOCK_M] x 3
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
    b64, i64, h64 = b.to(tl.int64), offs_i.to(tl.int64), offs_h.to(tl.int64)
    rows_q = (b64 * stride_q_batch + h64 * stride_q_head + i64 * stride_q_seq) * ALIGN  # [BLOCK_M]
    rows_do = (b64 * stride_do_batch + h64 * stride_do_head + i64 * stride_do_seq) * ALIGN  # [BLOCK_M]
    q = tl.load(q_ptr + rows_q[:, None] + offs_d[None, :] * stride_q_dim, mask=mask_q, other=0.0)
    do = tl.load(do_ptr + rows_do[:, None] + offs_d[None, :] * stride_do_dim, mask=mask_q, other=0.0)
    rows_lse = (b64 * kv_heads + kv_head) * (q_len * GROUP) + query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + rows_lse, mask=mask_m, other=float("inf"))  # [BLOCK_M]
    delta = tl.load(delta_ptr + rows_lse, mask=mask_m, other=0.0)  # [BLOCK_M]

    own_keys, prefix_keys, own_start, own_end, prefix_len, _ = open_row(
        b, kv_head, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr,
        task_ids_ptr, starts_ptr, lens_ptr, kv_start_ptr, kv_len_ptr,
        stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
        stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
        stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
        stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
        stride_task_ids, stride_kv_start, stride_kv_len, kv_capacity, num_tasks, ALIGN)  # fmt: skip
    past = own_end - q_len
    query = past + offs_i  # [BLOCK_M]
    bias = open_bias(bias_ptr, stride_bias_head, stride_bias_entry, bias_reach, bias_scale, offs_h[:, None],
                     (kv_capacity - q_len + offs_i if BIAS_OF_SLOTS else query)[:, None])  # fmt: skip
    prefix, own = split_row(
        past + query_tile * BLOCK_M // GROUP,
        past + tl.minimum((query_tile * BLOCK_M + BLOCK_M - 1) // GROUP, q_len - 1),
        own_start, own_end, prefix_len, window, CAUSAL, BLOCK_N, BLOCK_N)  # fmt: skip

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in tl.range(0, prefix[3] + own[3]):
        is_own, start = full_tile(n, prefix, own, BLOCK_N, BLOCK_N)
        dq = add_keys(dq, q, do, lse, delta, query, start, is_own, own[1], prefix[1], prefix_len, own_keys, prefix_keys,
                      window, scale_log2, softcap_inner, bias, MASKED=False, CAUSAL=CAUSAL, HEAD_DIM=HEAD_DIM,
                      ALIGN=ALIGN, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)  # fmt: skip
    for n in tl.range(0, prefix[2] + prefix[4] + own[2] + own[4]):
        is_own, start = edge_tile(n, prefix, own, BLOCK_N, BLOCK_N)
        dq = add_keys(dq, q, do, lse, delta, query, start, is_own, own[1], prefix[1], prefix_len, own_keys, prefix_keys,
                      window, scale_log2, softcap_inner, bias, MASKED=True, CAUSAL=CAUSAL, HEAD_DIM=HEAD_DIM,
                      ALIGN=ALIGN, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)  # fmt: skip

    offs_i, offs_h, mask_m = query_rows(again(query_tile), kv_head, q_len, GROUP, BLOCK_M)
    i64, h64 = offs_i.to(tl.int64), offs_h.to(tl.int64)
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
    rows_dq = (b64 * stride_dq_batch + h64 * stride_dq_head + i64 * stride_dq_seq) * ALIGN  # [BLOCK_M]
    dq_ptrs = dq_ptr + rows_dq[:, None] + offs_d[None, :] * stride_dq_dim
    tl.store(dq_ptrs, cast(dq * scale, dq_ptr.dtype.element_ty), mask=mask_q)


def query_gradient(
    operands: Operands, do: Tensor, lse: Tensor, delta: Tensor, config: TileConfig | None = None
) -> Tensor:
    """dq, in q's dtype and layout; do, lse and delta are `backward.saved_rows`."""
    config = config or operands.layout.config("backward_dq")
    dq = torch.empty_like(operands.q)
    query_tiles = cdiv(operands.q_len * operands.group, config.block_m)
    backward_dq_kernel[(query_tiles * operands.kv_heads * operands.batch,)](
        **strided(
            q=operands.q, k=operands.k, v=operands.v, prefix_k=operands.prefix.k, prefix_v=operands.prefix.v, do=do,
            dq=dq,
        ),
        **operands.row_arguments(), **backward_scales(operands.scale, operands.softcap),
        lse_ptr=lse, delta_ptr=delta, query_tiles=query_tiles,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=padded_head_dim(operands.head_dim),
        num_warps=config.num_warps, num_stages=config.num_stages, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return dq
