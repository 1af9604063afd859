"""Join two attention results of the same queries over different keys, by their log-sum-exps, in one launch.

    top = max(lse_a, lse_b)    w = exp(lse - top)    out = (w_a a + w_b b) / (w_a + w_b)         (natural log)

For peers that compute both parts with a library whose own kernels do not merge.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.primitives import cast


@triton.jit
def merge_kernel(
    a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, out_ptr,
    stride_a_outer, stride_a_inner, stride_a_head, stride_a_member,
    stride_lse_a_outer, stride_lse_a_inner, stride_lse_a_head, stride_lse_a_member,
    stride_b_outer, stride_b_inner, stride_b_head, stride_b_member,
    stride_lse_b_outer, stride_lse_b_inner, stride_lse_b_head, stride_lse_b_member,
    inner, heads, members,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out ``[outer, inner, heads, members, HEAD_DIM]``, contiguous; program = (outer, inner), all heads in one tile."""
    row = tl.program_id(0).to(tl.int64)
    i, j = row // inner, row % inner
    offs_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    head, member = offs_h // members, offs_h % members
    mask_h = offs_h < heads * members
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_H, BLOCK_D]

    places = i * stride_lse_a_outer + j * stride_lse_a_inner + head * stride_lse_a_head + member * stride_lse_a_member
    lse_a = tl.load(lse_a_ptr + places, mask=mask_h, other=0.0)  # [BLOCK_H]
    places = i * stride_lse_b_outer + j * stride_lse_b_inner + head * stride_lse_b_head + member * stride_lse_b_member
    lse_b = tl.load(lse_b_ptr + places, mask=mask_h, other=0.0)  # [BLOCK_H]
    top = tl.maximum(lse_a, lse_b)
    weight_a, weight_b = tl.exp(lse_a - top), tl.exp(lse_b - top)

    places = i * stride_a_outer + j * stride_a_inner + head * stride_a_head + member * stride_a_member
    a = tl.load(a_ptr + places[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    places = i * stride_b_outer + j * stride_b_inner + head * stride_b_head + member * stride_b_member
    b = tl.load(b_ptr + places[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    out = (a * weight_a[:, None] + b * weight_b[:, None]) / (weight_a + weight_b)[:, None]
    out_ptrs = out_ptr + (row * heads * members + offs_h)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptrs, cast(out, out_ptr.dtype.element_ty), mask=mask)


def merge_two(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
    """The merged result, contiguous.

    Args:
        a, b: ``[outer, inner, heads, members, head_dim]``, any strides but 1 in head_dim.
        lse_a, lse_b: float32 ``[outer, inner, heads, members]``, in nats, any strides.
    """
    assert a.shape == b.shape, f"a {list(a.shape)}, b {list(b.shape)}"
    assert lse_a.shape == lse_b.shape == a.shape[:4], f"lse {list(lse_a.shape)} and {list(lse_b.shape)}"
    assert a.stride(4) == b.stride(4) == 1, "head_dim must be contiguous"
    outer, inner, heads, members, head_dim = a.shape
    out = a.new_empty(a.shape)
    axes = ("outer", "inner", "head", "member")
    tensors = {"a": a, "lse_a": lse_a, "b": b, "lse_b": lse_b}
    strides = {f"stride_{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(axes)}
    block_h, block_d = triton.next_power_of_2(heads * members), triton.next_power_of_2(head_dim)
    merge_kernel[(outer * inner,)](
        a_ptr=a, lse_a_ptr=lse_a, b_ptr=b, lse_b_ptr=lse_b, out_ptr=out, **strides,
        inner=inner, heads=heads, members=members, HEAD_DIM=head_dim, BLOCK_H=block_h, BLOCK_D=block_d,
        num_warps=max(1, min(8, block_h * block_d // 1024)),
    )  # fmt: skip
    return out
