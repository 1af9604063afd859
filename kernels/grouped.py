"""Grouped decode: few queries a row; a prefix that rows share is read once for each tile of their query rows.

    out = softmax(scale * q @ [pk; k]^T + mask) @ [pv; v]          lse in nats; a query that sees nothing: 0 and -inf

One launch has two kinds of work items, and both write float32 partial results, which merge_kernel joins in the order
prefix chunks, own chunks:

- prefix item = (tile of query rows gathered by task, kv head, chunk of the task's prefix). The rows of a tile belong to
  many rows of the batch; they are found by index (prefix_attn/plan.py), nothing is moved. Full tiles of keys take no
  mask; the edges are tiles of BLOCK_E keys, as are those of the other kind.
- request item = (as many rows as warps, kv head, tile of query rows, chunk of each row's own keys): a warp has a row to
  itself, where registers allow; else an item has one row, as in decode.py without the prefix.

The first kind keeps the tensor cores busy and the second the memory; they alternate in the launch, so that they
overlap.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.chunks import MAX_CHUNKS, Residency, choose_chunks
from prefix_attn.kernels.config import TileConfig, cdiv, decode_rows, edge_keys, item_rows, padded_head_dim
from prefix_attn.kernels.decode import MIN_TILES
from prefix_attn.kernels.direct_launch import Launcher
from prefix_attn.kernels.early_launch import early_options, let_next_begin, wait_for_previous
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, LAYOUTS, Layout, Operands, contiguous
from prefix_attn.kernels.merge import Partials, merge_chunks
from prefix_attn.kernels.primitives import (
    again,
    append_axes,
    attend_keys,
    empty_state,
    load_row,
    normalise,
    open_bias,
    partial_rows,
    query_rows,
    runtime_jit,
)
from prefix_attn.kernels.spans import split_span, visible_span

#: What the merge of a chunk costs, in the time of a tile: once, and for each of its elements.
CHUNK_TILES, ELEMENT_TILES = 0.7, 0.3 / (64 * 32 * 128)


@triton.jit
def prefix_item(
    item, q_ptr, prefix_k_ptr, prefix_v_ptr, partial_ptr, partial_lse_ptr,
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
    """Partial results of one tile of gathered query rows over one chunk of their task's prefix."""
    # Tiles vary fastest: those of one task lie side by side and read the same keys.
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
        acc, row_sum, row_max = empty_state(q)
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
        # A member's number counts rows, heads of the group and queries: it is the place within a kv head.
        places = (chunk.to(tl.int64) * kv_heads + kv_head) * batch * GROUP * q_len + member  # [BLOCK_M]
        tl.store(partial_lse_ptr + places, lse, mask=member >= 0)
        seen = (member >= 0) & (lse != float("-inf"))  # the merge never reads the out of the others
        mask_out = seen[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store((partial_ptr + places * HEAD_DIM)[:, None] + offs_d[None, :], out, mask=mask_out)


@triton.jit
def request_item(
    item, q_ptr, k_ptr, v_ptr, partial_ptr, partial_lse_ptr,
    task_ids_ptr, starts_ptr, lens_ptr, kv_start_ptr, kv_len_ptr, bias_ptr, planned_ptr,
    stride_q_batch, stride_q_head, stride_q_seq, stride_q_dim,
    stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
    stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
    stride_task_ids, stride_kv_start, stride_kv_len, stride_bias_head, stride_bias_entry,
    batch, kv_heads, q_len, kv_capacity, num_tasks, query_tiles, prefix_chunks, own_chunks,
    window, scale_log2, softcap_inner, bias_reach, bias_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, CAUSAL: tl.constexpr, BIAS_OF_SLOTS: tl.constexpr,
    MIN_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Partial results of one tile of the query rows of ROWS rows, each over one chunk of its own keys.

    Chunks are counted in tiles of BLOCK_N keys; the ROWS rows share such a tile's place, BLOCK_N / ROWS keys each.
    """
    KEYS: tl.constexpr = BLOCK_N // ROWS
    batch_tile = item % tl.cdiv(batch, ROWS)
    item = item // tl.cdiv(batch, ROWS)
    kv_head = item % kv_heads
    item = item // kv_heads
    query_tile = item % query_tiles
    chunk = item // query_tiles
    # What belongs to a row is a scalar if there is one row, else [ROWS]: a warp has a row to itself.
    b, offs_i, offs_h, mask_m = rows_of_item(batch_tile, batch, query_tile, kv_head, q_len, GROUP, BLOCK_M, ROWS)
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    b64, i64, h64 = b.to(tl.int64), offs_i.to(tl.int64), offs_h.to(tl.int64)
    rows_q = (
        append_axes(b64 * stride_q_batch, 1) + h64 * stride_q_head + i64 * stride_q_seq
    ) * ALIGN  # [(ROWS,) BLOCK_M]
    mask_q = tl.expand_dims(mask_m, -1) & (offs_d < HEAD_DIM)  # [(ROWS,) BLOCK_M, BLOCK_D], as q
    q = tl.load(q_ptr + tl.expand_dims(rows_q, -1) + offs_d * stride_q_dim, mask=mask_q, other=0.0)

    _, prefix_len, own_start, own_end, broken = load_row(
        b, task_ids_ptr, stride_task_ids, starts_ptr, lens_ptr, kv_start_ptr, stride_kv_start, kv_len_ptr,
        stride_kv_len, num_tasks, kv_capacity)  # fmt: skip
    # A plan of other ids, or of the bank as it was, has left the row out or given it to another task.
    planned = tl.load(planned_ptr + b)
    task = tl.load(task_ids_ptr + b64 * stride_task_ids)
    broken = broken | ((planned != task) & ((planned >= 0) | (prefix_len > 0)))
    past = own_end - q_len
    query = append_axes(past, 1) + offs_i  # [(ROWS,) BLOCK_M]
    bias = open_bias(bias_ptr, stride_bias_head, stride_bias_entry, bias_reach, bias_scale, offs_h[:, None],
                     tl.expand_dims(kv_capacity - q_len + offs_i if BIAS_OF_SLOTS else query, -1))  # fmt: skip
    lo, hi, _, _ = visible_span(
        own_start, own_end, past + query_tile * BLOCK_M // GROUP,
        past + tl.minimum((query_tile * BLOCK_M + BLOCK_M - 1) // GROUP, q_len - 1), window, CAUSAL)  # fmt: skip
    first, last = None, None
    if CAUSAL:
        last = query
    if window is not None:
        first = query - window + 1

    per_chunk = tl.maximum(tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), own_chunks), MIN_TILES) * BLOCK_N
    begin = lo + chunk * per_chunk
    end = tl.minimum(begin + per_chunk, hi)
    steps = tl.cdiv(end - begin, KEYS)
    if ROWS > 1:
        steps = tl.max(steps, 0)
    head = kv_head.to(tl.int64)
    keys = (
        k_ptr + append_axes(b64 * stride_k_batch + head * stride_k_head, 2) * ALIGN,
        v_ptr + append_axes(b64 * stride_v_batch + head * stride_v_head, 2) * ALIGN,
        stride_k_seq, stride_k_dim, stride_v_seq, stride_v_dim,
    )  # fmt: skip
    begin, end = append_axes(begin, 2), append_axes(end, 2)
    acc, row_sum, row_max = empty_state(q)
    for n in tl.range(0, steps):
        acc, row_sum, row_max = attend_keys(
            acc, row_sum, row_max, q, begin + n * KEYS, end, first, last, keys, scale_log2, softcap_inner, bias, 0,
            MASKED=True, HEAD_DIM=HEAD_DIM, ALIGN=ALIGN, BLOCK_N=KEYS, BLOCK_D=BLOCK_D)  # fmt: skip

    out, lse = normalise(acc, row_sum, row_max, append_axes(broken, 1))
    b, offs_i, offs_h, mask_m = rows_of_item(
        again(batch_tile), batch, again(query_tile), kv_head, q_len, GROUP, BLOCK_M, ROWS)  # fmt: skip
    place = append_axes(b.to(tl.int64), 1)
    if chunk == 0:  # no prefix item writes for a row that is not planned
        planned = tl.load(planned_ptr + b)
        alone = mask_m & (tl.minimum(append_axes(planned, 1), offs_i) < 0)  # as mask_m
        for c in tl.range(0, prefix_chunks):
            places = partial_rows(c, kv_head, place, offs_h % GROUP, offs_i, kv_heads, batch, q_len, GROUP)
            nothing = tl.full(places.shape, float("-inf"), tl.float32)
            tl.store(partial_lse_ptr + places, nothing, mask=alone)
    places = partial_rows(prefix_chunks + chunk, kv_head, place, offs_h % GROUP, offs_i, kv_heads, batch, q_len, GROUP)
    tl.store(partial_lse_ptr + places, lse, mask=mask_m)
    mask_out = tl.expand_dims(mask_m & (lse != float("-inf")), -1) & (offs_d < HEAD_DIM)
    tl.store(partial_ptr + tl.expand_dims(places * HEAD_DIM, -1) + offs_d, out, mask=mask_out)


@triton.jit
def rows_of_item(batch_tile, batch, query_tile, kv_head, q_len, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                 ROWS: tl.constexpr):  # fmt: skip
    """Rows of a request item, a scalar or ``[ROWS]``, and their `query_rows`; the mask is ``[(ROWS,) BLOCK_M]``."""
    b = batch_tile
    offs_i, offs_h, mask = query_rows(query_tile, kv_head, q_len, GROUP, BLOCK_M)
    if ROWS > 1:
        b = b * ROWS + tl.arange(0, ROWS)
        mask = (b < batch)[:, None] & mask
        b = tl.minimum(b, batch - 1)
    return b, offs_i, offs_h, mask


@runtime_jit
def grouped_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, task_ids_ptr, starts_ptr, lens_ptr, kv_start_ptr, kv_len_ptr,
    bias_ptr, planned_ptr, tasks_ptr, members_ptr, partial_ptr, partial_lse_ptr,
    stride_q_batch, stride_q_head, stride_q_seq, stride_q_dim,
    stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
    stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
    stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
    stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
    stride_task_ids, stride_kv_start, stride_kv_len, stride_bias_head, stride_bias_entry,
    batch, kv_heads, q_len, kv_capacity, num_tasks, tiles, query_tiles, prefix_chunks, own_chunks,
    prefix_items, request_items, window, scale_log2, softcap_inner, bias_reach, bias_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, CAUSAL: tl.constexpr, BIAS_OF_SLOTS: tl.constexpr,
    MIN_TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Partial results (`prefix_attn.kernels.merge.Partials`) of the prefix chunks, then of the own ones."""
    wait_for_previous(EARLY)
    let_next_begin(EARLY)
    pid = tl.program_id(0)
    both = 2 * tl.minimum(prefix_items, request_items)
    on_prefix = tl.where(pid < both, pid % 2 == 0, prefix_items > request_items)
    item = tl.where(pid < both, pid // 2, pid - both // 2)
    if on_prefix:
        prefix_item(
            item, q_ptr, prefix_k_ptr, prefix_v_ptr, partial_ptr, partial_lse_ptr,
            starts_ptr, lens_ptr, kv_len_ptr, bias_ptr, tasks_ptr, members_ptr,
            stride_q_batch, stride_q_head, stride_q_seq, stride_q_dim,
            stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
            stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
            stride_kv_len, stride_bias_head, stride_bias_entry,
            batch, kv_heads, q_len, kv_capacity, num_tasks, tiles, prefix_chunks,
            window, scale_log2, softcap_inner, bias_reach, bias_scale,
            GROUP=GROUP, HEAD_DIM=HEAD_DIM, ALIGN=ALIGN, BIAS_OF_SLOTS=BIAS_OF_SLOTS, MIN_TILES=MIN_TILES,
            BLOCK_M=BLOCK_P, BLOCK_N=BLOCK_N, BLOCK_E=BLOCK_E, BLOCK_D=BLOCK_D)  # fmt: skip
    else:
        request_item(
            item, q_ptr, k_ptr, v_ptr, partial_ptr, partial_lse_ptr,
            task_ids_ptr, starts_ptr, lens_ptr, kv_start_ptr, kv_len_ptr, bias_ptr, planned_ptr,
            stride_q_batch, stride_q_head, stride_q_seq, stride_q_dim,
            stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
            stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
            stride_task_ids, stride_kv_start, stride_kv_len, stride_bias_head, stride_bias_entry,
            batch, kv_heads, q_len, kv_capacity, num_tasks, query_tiles, prefix_chunks, own_chunks,
            window, scale_log2, softcap_inner, bias_reach, bias_scale,
            GROUP=GROUP, HEAD_DIM=HEAD_DIM, ALIGN=ALIGN, CAUSAL=CAUSAL, BIAS_OF_SLOTS=BIAS_OF_SLOTS,
            MIN_TILES=MIN_TILES, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_E, BLOCK_D=BLOCK_D, ROWS=ROWS)  # fmt: skip


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
        chunks: of the prefixes and of the own keys; by default they follow from shapes and max_len. Nothing is read
            back from the device.
    """
    operands = operands.scaled
    launch = _launch(operands.layout, *members.shape, max_len, config, chunks)
    partials = Partials.empty(launch.chunks, operands.q, operands.kv_heads)
    launch.run(grouped_kernel, {
        **operands.tensors(), "bias_ptr": operands.relative_bias, "planned_ptr": planned, "tasks_ptr": tasks,
        "members_ptr": members, "partial_ptr": partials.out, "partial_lse_ptr": partials.lse,
    })  # fmt: skip
    merge_chunks(partials, out, lse, contiguous(operands.sinks), launch.chunks)


class _Launch(NamedTuple):
    run: Launcher
    chunks: int  # of prefixes and own keys


@lru_cache(maxsize=LAYOUTS)
def _launch(
    layout: Layout, tiles: int, tile_rows: int, max_len: int, config: TileConfig | None, chunks: tuple[int, int] | None
) -> _Launch:
    """A launch of grouped_kernel but for its tensors."""
    (batch, _, q_len, head_dim), (_, kv_heads, kv_capacity, _) = layout.q_shape, layout.k_shape
    rows = q_len * layout.group
    config = config or layout.config("grouped", tile_rows)
    block_m, block_e = decode_rows(rows), edge_keys(config.block_n)
    query_tiles = cdiv(rows, block_m)
    rows_at_once = item_rows(block_m, block_e, config.num_warps, head_dim, layout.dtype, layout.softcap)
    requests = cdiv(batch, rows_at_once) * kv_heads * query_tiles
    if chunks is None:
        at_once = Residency.of("grouped", config, head_dim, layout.dtype, layout.device)
        joined = CHUNK_TILES + ELEMENT_TILES * math.prod(layout.q_shape)
        # As many tiles as there are if all tasks have as many rows.
        groups = max(1, min(batch, layout.num_tasks))
        programs = groups * cdiv(cdiv(batch, groups) * rows, tile_rows) * kv_heads
        steps = cdiv(kv_capacity, block_e // rows_at_once)  # of a request item, each as much work as a tile
        chunks = (
            choose_chunks(programs, cdiv(max_len, config.block_n), at_once, 0.0, joined),
            choose_chunks(requests, steps, at_once, 0.0, joined, cdiv(kv_capacity, MIN_TILES * block_e)),
        )
    prefix_chunks, own_chunks = (min(c, MAX_CHUNKS // 2) for c in chunks)
    prefix_items = tiles * kv_heads * prefix_chunks
    request_items = requests * own_chunks
    arguments = {
        **layout.arguments(), "batch": batch, "tiles": tiles, "query_tiles": query_tiles,
        "prefix_chunks": prefix_chunks, "own_chunks": own_chunks,
        "prefix_items": prefix_items, "request_items": request_items, "MIN_TILES": MIN_TILES,
        "BLOCK_P": tile_rows, "BLOCK_M": block_m, "BLOCK_N": config.block_n, "BLOCK_E": block_e,
        "BLOCK_D": padded_head_dim(head_dim), "ROWS": rows_at_once,
        "num_warps": config.num_warps, "num_stages": config.num_stages, **early_options(layout.device),
        **LAUNCH_OPTIONS,
    }  # fmt: skip
    return _Launch(Launcher(prefix_items + request_items, arguments), prefix_chunks + own_chunks)
