"""Gradients of one attention call, from its out and lse: no score is kept between the passes.

    delta_i = dout_i . out_i - dlse_i          dsink_h = -sum over rows and queries of exp(sink_h - lse_i) delta_i

A first kernel makes delta, and lse in base 2; dq, the gradients of own keys and those of the bank are independent
of one another (backward_dq.py, backward_dkv.py). A query that saw nothing has p = 0 and no part in any gradient.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.backward_dkv import bank_gradients, own_key_gradients
from prefix_attn.kernels.backward_dq import query_gradient
from prefix_attn.kernels.config import cdiv, padded_head_dim
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, Operands, strided
from prefix_attn.kernels.primitives import LOG2_E, runtime_jit


@runtime_jit
def delta_kernel(
    out_ptr, do_ptr, lse_ptr, grad_lse_ptr, lse_log2_ptr, delta_ptr,
    stride_out_batch, stride_out_head, stride_out_seq, stride_out_dim,
    stride_do_batch, stride_do_head, stride_do_seq, stride_do_dim,
    rows, heads, q_len,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``delta[b, kv_head, i, g] = dout . out - dlse`` and lse in base 2, in the order in which the kernels read them.

    For a query with lse -inf or NaN delta is 0 and lse +inf, so that p is 0.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], as all below
    mask_m = row < rows
    head = row // (q_len * GROUP) % (heads // GROUP) * GROUP + row % GROUP
    b64, h64 = (row // q_len // heads).to(tl.int64), head.to(tl.int64)
    i64 = (row // GROUP % q_len).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
    rows_out = (b64 * stride_out_batch + h64 * stride_out_head + i64 * stride_out_seq) * ALIGN
    rows_do = (b64 * stride_do_batch + h64 * stride_do_head + i64 * stride_do_seq) * ALIGN
    out = tl.load(out_ptr + rows_out[:, None] + offs_d[None, :] * stride_out_dim, mask=mask, other=0.0)
    do = tl.load(do_ptr + rows_do[:, None] + offs_d[None, :] * stride_do_dim, mask=mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    rows_lse = (b64 * heads + h64) * q_len + i64
    lse = tl.load(lse_ptr + rows_lse, mask=mask_m, other=0.0)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + rows_lse, mask=mask_m, other=0.0)
    saw = lse > float("-inf")
    tl.store(delta_ptr + row, tl.where(saw, delta, 0.0), mask=mask_m)
    tl.store(lse_log2_ptr + row, tl.where(saw, lse * LOG2_E, float("inf")), mask=mask_m)


def attention_backward(
    operands: Operands, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, prefix_k, prefix_v and sinks, in their shapes; None for those not ``needed``.

    Args:
        out, grad_out: ``[batch, q_heads, q_len, head_dim]``; any strides.
        lse, grad_lse: float32 ``[batch, q_heads, q_len]``; natural log, as the forward kernels write it.
        needed: whether each of the six is wanted; keys come with their values.
    """
    dq = dk = dv = dpk = dpv = dsinks = None
    do, lse_log2, delta = saved_rows(operands, out, lse, grad_out, grad_lse)
    if needed[0]:
        dq = query_gradient(operands, do, lse_log2, delta)
    if needed[1] or needed[2]:
        dk, dv = own_key_gradients(operands, do, lse_log2, delta)
    if needed[3] or needed[4]:
        dpk, dpv = bank_gradients(operands, do, lse_log2, delta)
    if needed[5] and operands.sinks is not None:
        sinks = operands.sinks.float().reshape(1, operands.kv_heads, 1, operands.group)
        dsinks = -(torch.exp2(sinks * LOG2_E.value - lse_log2) * delta).sum((0, 2)).flatten()
        dsinks = dsinks.to(operands.sinks.dtype)
    return dq, dk, dv, dpk, dpv, dsinks


def saved_rows(
    operands: Operands, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What every backward kernel reads of each query: dout in q's dtype; lse in base 2 and delta, both float32
    ``[batch, kv_heads, q_len, group]``."""
    batch, heads, q_len, head_dim = out.shape
    do = grad_out.to(operands.q.dtype)
    lse_log2, delta = (lse.new_empty(batch, operands.kv_heads, q_len, operands.group) for _ in range(2))
    block_m, block_d = 32, padded_head_dim(head_dim)
    delta_kernel[(cdiv(batch * heads * q_len, block_m),)](
        **strided(out=out, do=do), lse_ptr=lse.contiguous(),
        grad_lse_ptr=None if grad_lse is None else grad_lse.float().contiguous(),
        lse_log2_ptr=lse_log2, delta_ptr=delta, rows=batch * heads * q_len, heads=heads, q_len=q_len,
        GROUP=operands.group, HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return do, lse_log2, delta
