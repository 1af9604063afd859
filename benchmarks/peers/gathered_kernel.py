"""The kernel of `gathered`: decode of ROWS rows of a task in one program, one query a row.

    out[b, h] = softmax_j(scale * q[b, h] . k_j) @ v_j          j: the prefix of row b's task, then its own keys

Program = (tile of query rows gathered by task, kv head). Each warp has keys of its own and the queries of all rows, as
in kernels/decode.py: a slice of a tile of the prefix, which so is read once for ROWS rows, or the own keys of one row,
which the queries of the others do not see. The slices' states are joined once, at the end: no partial results.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.config import TileConfig, padded_head_dim
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, Operands
from prefix_attn.kernels.primitives import (
    NO_LIMIT,
    attend_keys,
    cast,
    empty_state,
    join_slices,
    normalise,
    runtime_jit,
    slice_queries,
)

#: Rows of a program, each of which has a warp for its own keys.
ROWS = 4


@runtime_jit
def gathered_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, starts_ptr, lens_ptr, tasks_ptr, members_ptr, out_ptr,
    stride_q_batch, stride_q_head, stride_q_dim,
    stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
    stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
    stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
    stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
    stride_out_batch, stride_out_head, stride_out_dim,
    tiles, own_end, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A step takes KEYS keys for each warp; BLOCK_M >= ROWS * GROUP, the query rows of a tile of the plan."""
    # Tiles vary fastest: those of one task lie side by side and read the same keys.
    tile = tl.program_id(0) % tiles
    kv_head = tl.program_id(0) // tiles
    task = tl.load(tasks_ptr + tile)
    if task >= 0:
        prefix_len = tl.load(lens_ptr + task)
        prefix_start = tl.multiple_of(tl.load(starts_ptr + task), 16).to(tl.int64)
        head = kv_head.to(tl.int64)

        offs_m = tl.arange(0, BLOCK_M)  # [BLOCK_M], as the next four
        member = tl.load(members_ptr + tile * (ROWS * GROUP) + offs_m, mask=offs_m < ROWS * GROUP, other=-1)
        mask_m = member >= 0
        b64, h64 = (member // GROUP).to(tl.int64), head * GROUP + member % GROUP
        rows_q = (b64 * stride_q_batch + h64 * stride_q_head) * ALIGN
        offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
        q = tl.load(q_ptr + rows_q[:, None] + offs_d[None, :] * stride_q_dim, mask=mask_q, other=0.0)

        row = tl.arange(0, ROWS)  # [ROWS], as the next three
        first_member = tl.load(members_ptr + tile * (ROWS * GROUP) + row * GROUP)
        row_end = tl.where(first_member >= 0, own_end, 0)
        batch_row = (tl.maximum(first_member, 0) // GROUP).to(tl.int64)[:, None, None]  # [ROWS, 1, 1]
        # Offsets, not pointers: where tensors of pointers are selected the compiler forgets how they are aligned.
        row_k = batch_row * stride_k_batch + head * stride_k_head
        row_v = batch_row * stride_v_batch + head * stride_v_head
        task_k = prefix_start * stride_prefix_k_seq + head * stride_prefix_k_head
        task_v = prefix_start * stride_prefix_v_seq + head * stride_prefix_v_head
        # Own keys are seen by the queries of their row.
        theirs = tl.where(offs_m[None, :] // GROUP == row[:, None], NO_LIMIT, -1)  # [ROWS, BLOCK_M]

        prefix_steps, own_steps = tl.cdiv(prefix_len, ROWS * KEYS), tl.cdiv(own_end, KEYS)
        # Every period-th step is one of the prefix until none is left: it comes from the cache, own keys from memory.
        period = own_steps // tl.maximum(prefix_steps, 1) + 1
        q = slice_queries(q, ROWS)
        acc, row_sum, row_max = empty_state(q)  # of each warp
        for step in tl.range(0, prefix_steps + own_steps):
            turn = step // period  # prefix steps before this one, while some are left
            own = (turn >= prefix_steps) | (step % period < period - 1)
            start = tl.where(own, (step - tl.minimum(turn, prefix_steps)) * KEYS, (turn * ROWS + row) * KEYS)  # [ROWS]
            keys = (
                tl.where(own, k_ptr, prefix_k_ptr) + tl.where(own, row_k, task_k) * ALIGN,
                tl.where(own, v_ptr, prefix_v_ptr) + tl.where(own, row_v, task_v) * ALIGN,
                tl.where(own, stride_k_seq, stride_prefix_k_seq), tl.where(own, stride_k_dim, stride_prefix_k_dim),
                tl.where(own, stride_v_seq, stride_prefix_v_seq), tl.where(own, stride_v_dim, stride_prefix_v_dim),
            )  # fmt: skip
            end = tl.where(own, row_end, prefix_len)  # [ROWS]
            acc, row_sum, row_max = attend_keys(
                acc, row_sum, row_max, q, start[:, None, None], end[:, None, None], None,
                tl.where(own, theirs, NO_LIMIT), keys, scale_log2, None, None, 0,
                MASKED=True, HEAD_DIM=HEAD_DIM, ALIGN=ALIGN, BLOCK_N=KEYS, BLOCK_D=BLOCK_D)  # fmt: skip
        acc, row_sum, row_max = join_slices(acc, row_sum, row_max)

        out, _ = normalise(acc, row_sum, row_max, False)
        rows_out = (b64 * stride_out_batch + h64 * stride_out_head) * ALIGN  # [BLOCK_M]
        out_ptrs = out_ptr + rows_out[:, None] + offs_d[None, :] * stride_out_dim
        tl.store(out_ptrs, cast(out, out_ptr.dtype.element_ty), mask=mask_q)


def gathered_attention(operands: Operands, tasks: Tensor, members: Tensor, out: Tensor) -> None:
    """Write out.

    Args:
        operands: of one query a row, without bounds, window, softcap, sinks and bias; every row has a task.
        tasks, members: as in `prefix_attn.plan.RowTiles`, in tiles of ``ROWS * group``.
    """
    config = tile_shape(operands.group, operands.head_dim)
    arguments = operands.layout.arguments(out=out.stride())
    needed = {name: arguments[name] for name in gathered_kernel.arg_names if name in arguments}
    starts, lens = operands.prefix.starts.contiguous(), operands.prefix.lens.contiguous()
    gathered_kernel[(tasks.shape[0] * operands.kv_heads,)](
        q_ptr=operands.q, k_ptr=operands.k, v_ptr=operands.v, prefix_k_ptr=operands.prefix.k,
        prefix_v_ptr=operands.prefix.v, starts_ptr=starts, lens_ptr=lens, tasks_ptr=tasks, members_ptr=members,
        out_ptr=out, tiles=tasks.shape[0], own_end=operands.kv_capacity, ROWS=ROWS, BLOCK_M=config.block_m,
        KEYS=config.block_n // ROWS, BLOCK_D=padded_head_dim(operands.head_dim),
        num_warps=config.num_warps, num_stages=config.num_stages, **needed, **LAUNCH_OPTIONS,
    )  # fmt: skip


def tile_shape(group: int, head_dim: int) -> TileConfig:
    """For 16-bit keys: 32 KiB a step, of which two are on their way while one is used."""
    keys = max(16, 2048 // padded_head_dim(head_dim))
    return TileConfig(max(16, triton.next_power_of_2(ROWS * group)), ROWS * keys, ROWS, 4)
