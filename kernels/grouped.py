"""Grouped decode: few queries a row, and a prefix that rows share is read once for a tile of them.

    out = softmax(scale * q @ [pk; k]^T + mask) @ [pv; v]          lse in nats; a query that sees nothing: 0 and -inf

Two launches. The first attends to the prefixes, on tensor cores: program = (tile of query rows gathered by task, kv
head, chunk of the task's prefix). The rows of a tile belong to many rows of the batch; they are found by index
(prefix_attn/plan.py), nothing is moved. Full tiles of keys take no mask; the edges are tiles of BLOCK_E keys. The
second is decode.py on each row's own keys, which joins the partial results of the first, always in the same order.

(One launch with both kinds of programs would overlap them, but gives the many short ones of the second the registers
and the shared memory of the first: on an H200 it was slower wherever own keys are few.)
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.chunks import Residency, choose_chunks
from prefix_attn.kernels.config import TileConfig, config_for, edge_keys, padded_head_dim
from prefix_attn.kernels.decode import MIN_TILES, launch_decode, plan_launch
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, LAYOUTS, Layout, Operands, cdiv
from prefix_attn.kernels.launcher import Launcher
from prefix_attn.kernels.primitives import again, attend_keys, normalise, open_bias, runtime_jit
from prefix_attn.kernels.spans import split_span

#: What each chunk of the prefixes costs where they are joined, in the time of a tile.
CHUNK_TILES = 0.7


@runtime_jit
def prefix_kernel(
    q_ptr, prefix_k_ptr, prefix_v_ptr, partial_ptr, partial_lse_ptr,
    starts_ptr, lens_ptr, kv_len_ptr, bias_ptr, tasks_ptr, members_ptr,
    stride_q_batch, stride_q_head, stride_q_seq, stride_q_dim,
    stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
    stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
    stride_kv_len, stride_bias_head, stride_bias_entry,
    batch, kv_heads, q_len, kv_capacity, num_tasks, tiles, chunks,
    window, scale_log2, softcap_inner, bias_reach, bias_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, BIAS_OF_SLOTS: tl.constexpr,
    MIN_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial results (merge.py) of one tile of gathered query rows over one chunk of their task's prefix."""
    # Tiles vary fastest: those of one task lie side by side and read the same keys.
    item = tl.program_id(0)
    tile = item % tiles
    item = item // tiles
    kv_head = item % kv_heads
    chunk = item // kv_heads
    task = tl.load(tasks_ptr + tile)
    if task >= 0:
        known = task < num_tasks
        prefix_len = tl.maximum(tl.load(lens_ptr + task, mask=known, other=0), 0)
        # Starts are multiples of 16 (types.ALIGNMENT); a value read from memory has no alignment unless it is told.
        prefix_start = tl.multiple_of(tl.load(starts_ptr + task, mask=known, other=0), 16).to(tl.int64)

        member = tl.load(members_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))  # [BLOCK_M], as all below
        mask_m = member >= 0
        member = tl.maximum(member, 0)
        within = member % (q_len * GROUP)
        offs_i = within % q_len
        b64, i64 = (member // (q_len * GROUP)).to(tl.int64), offs_i.to(tl.int64)
        h64 = (kv_head * GROUP + within // q_len).to(tl.int64)
        offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
        rows_q = (b64 * stride_q_batch + h64 * stride_q_head + i64 * stride_q_seq) * ALIGN  # [BLOCK_M]
        q = tl.load(q_ptr + rows_q[:, None] + offs_d[None, :] * stride_q_dim, mask=mask_q, other=0.0)

        own_end = tl.zeros([BLOCK_M], tl.int32) + kv_capacity
        if kv_len_ptr is not None:
            own_end = tl.load(kv_len_ptr + b64 * stride_kv_len, mask=mask_m, other=0)
        query = own_end - q_len + offs_i
        bias = open_bias(bias_ptr, stride_bias_head, stride_bias_entry, bias_reach, bias_scale, h64[:, None],
                         (kv_capacity - q_len + offs_i if BIAS_OF_SLOTS else query)[:, None])  # fmt: skip

        lo, first = tl.full([], 0, tl.int32), None
        full_lo = lo
        if window is not None:
            first = prefix_len + query - window + 1  # [BLOCK_M], the first slot a query sees
            # A row whose kv_len is an error becomes NaN elsewhere; here it must not widen what the others read.
            sound = mask_m & (own_end >= 0) & (own_end <= kv_capacity)
            lo = tl.minimum(tl.maximum(tl.min(tl.where(sound, first, prefix_len), 0), 0), prefix_len)
            full_lo = tl.maximum(tl.max(tl.where(sound, first, 0), 0), 0)
        per_chunk = tl.maximum(tl.cdiv(tl.cdiv(prefix_len - lo, BLOCK_N), chunks), MIN_TILES) * BLOCK_N
        begin = tl.minimum(lo + chunk * per_chunk, prefix_len)
        end = tl.minimum(begin + per_chunk, prefix_len)
        left, full, right = split_span(begin, end, full_lo, end, BLOCK_N, BLOCK_E)

        keys = (
            prefix_k_ptr + (prefix_start * stride_prefix_k_seq + kv_head.to(tl.int64) * stride_prefix_k_head) * ALIGN,
            prefix_v_ptr + (prefix_start * stride_prefix_v_seq + kv_head.to(tl.int64) * stride_prefix_v_head) * ALIGN,
            stride_prefix_k_seq, stride_prefix_k_dim, stride_prefix_v_seq, stride_prefix_v_dim,
        )  # fmt: skip
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for n in tl.range(0, full):
            start = begin + left * BLOCK_E + n * BLOCK_N
            acc, row_sum, row_max = attend_keys(
                acc, row_sum, row_max, q, start, end, None, None, keys, scale_log2, softcap_inner, bias, prefix_len,
                MASKED=False, HEAD_DIM=HEAD_DIM, ALIGN=ALIGN, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)  # fmt: skip
        for n in tl.range(0, left + right):
            start = begin + n * BLOCK_E + tl.where(n < left, 0, full * BLOCK_N)
            acc, row_sum, row_max = attend_keys(
                acc, row_sum, row_max, q, start, end, first, None, keys, scale_log2, softcap_inner, bias, prefix_len,
                MASKED=True, HEAD_DIM=HEAD_DIM, ALIGN=ALIGN, BLOCK_N=BLOCK_E, BLOCK_D=BLOCK_D)  # fmt: skip

        out, lse = normalise(acc, row_sum, row_max, False)
        member = tl.load(members_ptr + again(tile) * BLOCK_M + tl.arange(0, BLOCK_M))
        places = (chunk.to(tl.int64) * kv_heads + kv_head) * batch * GROUP * q_len + member  # [BLOCK_M]
        tl.store(partial_lse_ptr + places, lse, mask=member >= 0)
        mask_out = (member >= 0)[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store((partial_ptr + places * HEAD_DIM)[:, None] + offs_d[None, :], out, mask=mask_out)


def grouped_attention(
    operands: Operands,
    planned: Tensor,
    tasks: Tensor,
    members: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    max_len: int,
    config: TileConfig | None = None,
    chunks: tuple[int, int] | None = None,
) -> None:
    """Write out, and lse (float32 ``[batch, q_heads, q_len]``, contiguous) if given.

    Args:
        planned, tasks, members: who shares with whom, as in `prefix_attn.plan.RowTiles`.
        max_len: about how long the longest prefix is; only speed depends on it.
        config: of the first launch.
        chunks: of the prefixes and of the own keys; by default they follow from shapes and max_len. Nothing is read
            back from the device.
    """
    operands = operands.scaled
    of_prefix, of_own = (None, None) if chunks is None else chunks
    first = _launch(operands.layout(), *members.shape, max_len, config, of_prefix)
    second = plan_launch(operands.layout(out), False, None, of_own, first.chunks)
    partials = second.empty_partials(operands)
    first.run(
        prefix_kernel, q_ptr=operands.q, prefix_k_ptr=operands.prefix_k, prefix_v_ptr=operands.prefix_v,
        partial_ptr=partials.out, partial_lse_ptr=partials.lse, starts_ptr=operands.starts.contiguous(),
        lens_ptr=operands.lens.contiguous(), kv_len_ptr=operands.kv_len, bias_ptr=operands.relative_bias,
        tasks_ptr=tasks, members_ptr=members,
    )  # fmt: skip
    launch_decode(second, operands, out, lse, partials, planned)


class _Launch(NamedTuple):
    run: Launcher
    chunks: int


@lru_cache(maxsize=LAYOUTS)
def _launch(
    layout: Layout, tiles: int, tile_rows: int, max_len: int, config: TileConfig | None, chunks: int | None
) -> _Launch:
    """A launch of prefix_kernel but for its tensors."""
    (batch, _, q_len, head_dim), (_, kv_heads, _, _) = layout.q_shape, layout.k_shape
    config = config or config_for(layout.kind("grouped"), head_dim, layout.dtype, layout.device)
    if chunks is None:
        at_once = Residency.of("grouped", config, head_dim, layout.dtype, layout.device)
        programs = cdiv(batch * q_len * layout.group, tile_rows) * kv_heads
        chunks = choose_chunks(programs, cdiv(max_len, config.block_n), at_once, 0.0, CHUNK_TILES)
    of_layout = {**layout.arguments(), **layout.bias_arguments()}
    arguments = {name: x for name, x in of_layout.items() if name in prefix_kernel.arg_names} | {
        "batch": batch, "tiles": tiles, "chunks": chunks, "MIN_TILES": MIN_TILES,
        "BLOCK_M": tile_rows, "BLOCK_N": config.block_n, "BLOCK_E": edge_keys(config.block_n),
        "BLOCK_D": padded_head_dim(head_dim),
        "num_warps": config.num_warps, "num_stages": config.num_stages, **LAUNCH_OPTIONS,
    }  # fmt: skip
    return _Launch(Launcher(tiles * kv_heads * chunks, arguments), chunks)
