"""Gradients of keys and values: a program keeps a tile of keys and loops over the queries that see it, in index order.

    dv_j = sum_i p_ij dout_i          dk_j = scale * sum_i dx_ij q_i          (p, dx and delta as in backward_dq.py)

Own keys: program = (key tile, kv head, row), over the row's queries. The bank: program = (task, prefix tile, kv head),
over the queries of all rows of the task, side by side. A sum belongs to one program and has one order: no atomics, so
the same inputs give the same bits. Where the bank has few tiles for the device, each sum is cut into parts of
consecutive queries, which are added in their order.

Keys that no query may see get 0, whatever they hold: a key only reaches its own row of the products.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.chunks import Residency, choose_chunks
from prefix_attn.kernels.config import TileConfig, cdiv, padded_head_dim
from prefix_attn.kernels.decode import MERGE_TILES
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, Operands, backward_scales, strided
from prefix_attn.kernels.primitives import (
    NO_LIMIT,
    cast,
    dot,
    finish_scores,
    load_keys,
    load_row,
    open_bias,
    runtime_jit,
    score_gradients,
)
from prefix_attn.kernels.spans import split_span

#: A prefix tile's sum is cut into parts of at least this many query tiles.
MIN_TILES = 8


@triton.jit
def add_queries(dk, dv, k, v, visible, rows_q, rows_do, rows_lse, mask_m, q_ptr, do_ptr, lse_ptr, delta_ptr,
                stride_q_dim, stride_do_dim, scale_log2, softcap_inner, bias, key,
                HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """``dk + dx^T @ q, dv + p^T @ dout`` for one tile of queries.

    Args:
        visible: ``[BLOCK_N, BLOCK_M]``, or None if every query sees every key.
        rows_q, rows_do, rows_lse: where each query lies in q, dout, and in lse and delta; mask_m: if it is one;
            ``[BLOCK_M]``.
        bias, key: as in `bias_scores`, of a row of queries and a column of keys.
    """
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
    q = tl.load(q_ptr + rows_q[:, None] + offs_d[None, :] * stride_q_dim, mask=mask, other=0.0)
    do = tl.load(do_ptr + rows_do[:, None] + offs_d[None, :] * stride_do_dim, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + rows_lse, mask=mask_m, other=float("inf"))  # [BLOCK_M]
    delta = tl.load(delta_ptr + rows_lse, mask=mask_m, other=0.0)  # [BLOCK_M]
    scores = finish_scores(dot(k, tl.trans(q)), softcap_inner, bias, key, q.dtype == tl.float32)  # [BLOCK_N, BLOCK_M]
    dp = dot(v, tl.trans(do))  # [BLOCK_N, BLOCK_M]
    p, dx = score_gradients(scores, dp, lse[None, :], delta[None, :], scale_log2, softcap_inner)
    if visible is not None:
        p = tl.where(visible, p, 0.0)
        dx = tl.where(visible, dx, 0.0)
    return dot(cast(dx, q.dtype), q, dk), dot(cast(p, do.dtype), do, dv)


@triton.jit
def store_keys(x, ptr, stride_seq, stride_dim, start, end, first, last, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write keys ``start .. start + BLOCK_N`` before ``end``; 0 for those outside ``first .. last``, last excluded."""
    offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    x = tl.where(((offs_n >= first) & (offs_n < last))[:, None], x, 0.0)
    ptrs = ptr + (offs_n.to(tl.int64) * stride_seq * ALIGN)[:, None] + offs_d[None, :] * stride_dim
    tl.store(ptrs, cast(x, ptr.dtype.element_ty), mask=(offs_n < end)[:, None] & (offs_d < HEAD_DIM)[None, :])


@runtime_jit
def backward_own_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    task_ids_ptr, starts_ptr, lens_ptr, kv_start_ptr, kv_len_ptr, bias_ptr,
    stride_q_batch, stride_q_head, stride_q_seq, stride_q_dim,
    stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
    stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
    stride_do_batch, stride_do_head, stride_do_seq, stride_do_dim,
    stride_dk_batch, stride_dk_head, stride_dk_seq, stride_dk_dim,
    stride_dv_batch, stride_dv_head, stride_dv_seq, stride_dv_dim,
    stride_task_ids, stride_kv_start, stride_kv_len, stride_bias_head, stride_bias_entry,
    kv_heads, q_len, kv_capacity, num_tasks, key_tiles, window, scale, scale_log2, softcap_inner,
    bias_reach, bias_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, CAUSAL: tl.constexpr, BIAS_OF_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``dk[b, h, j], dv[b, h, j]`` for BLOCK_N own keys j of row b, over the queries of h's group that see them."""
    pid = tl.program_id(0)
    start = pid % key_tiles * BLOCK_N
    pid = pid // key_tiles
    kv_head = pid % kv_heads
    b = pid // kv_heads
    b64, h64 = b.to(tl.int64), kv_head.to(tl.int64)
    _, _, own_start, own_end, _ = load_row(
        b, task_ids_ptr, stride_task_ids, starts_ptr, lens_ptr, kv_start_ptr, stride_kv_start, kv_len_ptr,
        stride_kv_len, num_tasks, kv_capacity)  # fmt: skip
    first = tl.maximum(start, own_start)
    last = tl.minimum(start + BLOCK_N, own_end)  # excluded

    # Queries that see some of these keys, lo .. hi, and that see all, full_lo .. full_hi.
    past = own_end - q_len
    lo, hi = tl.full([], 0, tl.int32), q_len
    full_lo, full_hi = lo, hi
    if CAUSAL:
        lo = tl.maximum(lo, first - past)
        full_lo = tl.maximum(lo, last - 1 - past)
    if window is not None:
        hi = tl.minimum(hi, window + last - 1 - past)
        full_hi = tl.minimum(hi, window + first - past)
    hi = tl.where(first < last, tl.maximum(hi, lo), lo)
    left, full, right = split_span(lo * GROUP, hi * GROUP, full_lo * GROUP, full_hi * GROUP, BLOCK_M, BLOCK_M)

    k = load_keys(k_ptr + (b64 * stride_k_batch + h64 * stride_k_head) * ALIGN, stride_k_seq, stride_k_dim,
                  start, last, True, HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D)  # fmt: skip
    v = load_keys(v_ptr + (b64 * stride_v_batch + h64 * stride_v_head) * ALIGN, stride_v_seq, stride_v_dim,
                  start, last, True, HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D)  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    q_ptr += (b64 * stride_q_batch + h64 * GROUP * stride_q_head) * ALIGN
    do_ptr += (b64 * stride_do_batch + h64 * GROUP * stride_do_head) * ALIGN
    lse_ptr += (b64 * kv_heads + kv_head) * (q_len * GROUP)
    delta_ptr += (b64 * kv_heads + kv_head) * (q_len * GROUP)

    offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Without causal, keys past kv_len are padding behind the row: positions count from the end of the slots.
    stands = kv_capacity - q_len if BIAS_OF_SLOTS else past
    for n in tl.range(left, left + full):
        rows = lo * GROUP + n * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], as all below
        i64, g64 = (rows // GROUP).to(tl.int64), (rows % GROUP).to(tl.int64)
        rows_q = (i64 * stride_q_seq + g64 * stride_q_head) * ALIGN
        rows_do = (i64 * stride_do_seq + g64 * stride_do_head) * ALIGN
        bias = open_bias(
            bias_ptr, stride_bias_head, stride_bias_entry, bias_reach, bias_scale,
            (kv_head * GROUP + rows % GROUP)[None, :], (stands + rows // GROUP)[None, :])  # fmt: skip
        dk, dv = add_queries(
            dk, dv, k, v, None, rows_q, rows_do, rows, rows < hi * GROUP, q_ptr, do_ptr, lse_ptr, delta_ptr,
            stride_q_dim, stride_do_dim, scale_log2, softcap_inner, bias, offs_n[:, None],
            HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D)  # fmt: skip
    for edge in tl.range(0, left + right):
        n = tl.where(edge < left, edge, edge + full)
        rows = lo * GROUP + n * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], as all below
        i64, g64 = (rows // GROUP).to(tl.int64), (rows % GROUP).to(tl.int64)
        rows_q = (i64 * stride_q_seq + g64 * stride_q_head) * ALIGN
        rows_do = (i64 * stride_do_seq + g64 * stride_do_head) * ALIGN
        bias = open_bias(
            bias_ptr, stride_bias_head, stride_bias_entry, bias_reach, bias_scale,
            (kv_head * GROUP + rows % GROUP)[None, :], (stands + rows // GROUP)[None, :])  # fmt: skip
        query = past + rows // GROUP
        visible = (offs_n < last)[:, None]  # [BLOCK_N, 1], [BLOCK_N, BLOCK_M] below
        if CAUSAL:
            visible = visible & (offs_n[:, None] <= query[None, :])
        if window is not None:
            visible = visible & (query[None, :] - offs_n[:, None] < window)
        dk, dv = add_queries(
            dk, dv, k, v, visible, rows_q, rows_do, rows, rows < hi * GROUP, q_ptr, do_ptr, lse_ptr, delta_ptr,
            stride_q_dim, stride_do_dim, scale_log2, softcap_inner, bias, offs_n[:, None],
            HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D)  # fmt: skip

    dk_ptr += (b64 * stride_dk_batch + h64 * stride_dk_head) * ALIGN
    dv_ptr += (b64 * stride_dv_batch + h64 * stride_dv_head) * ALIGN
    store_keys(dk * scale, dk_ptr, stride_dk_seq, stride_dk_dim, start, kv_capacity, first, last,
               HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D)  # fmt: skip
    store_keys(dv, dv_ptr, stride_dv_seq, stride_dv_dim, start, kv_capacity, first, last,
               HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D)  # fmt: skip


@runtime_jit
def backward_bank_kernel(
    q_ptr, prefix_k_ptr, prefix_v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    starts_ptr, lens_ptr, kv_len_ptr, bias_ptr, order_ptr, first_ptr, readers_ptr, tile_task_ptr, tile_slot_ptr,
    stride_q_batch, stride_q_head, stride_q_seq, stride_q_dim,
    stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
    stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
    stride_do_batch, stride_do_head, stride_do_seq, stride_do_dim,
    stride_dk_batch, stride_dk_head, stride_dk_seq, stride_dk_dim,
    stride_dv_batch, stride_dv_head, stride_dv_seq, stride_dv_dim,
    stride_kv_len, stride_bias_head, stride_bias_entry,
    kv_heads, q_len, kv_capacity, tiles, parts, window, scale, scale_log2, softcap_inner, bias_reach, bias_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, BIAS_OF_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``dk[part, h, j], dv[part, h, j]`` for BLOCK_N prefix slots j of a task, over a part of its rows' queries."""
    # Tiles vary fastest: those of one task lie side by side and read the same queries.
    pid = tl.program_id(0)
    tile = pid % tiles
    pid = pid // tiles
    kv_head = pid % kv_heads
    part = pid // kv_heads
    task = tl.load(tile_task_ptr + tile)
    if task < 0:
        return
    h64 = kv_head.to(tl.int64)
    slot = tl.load(tile_slot_ptr + tile)
    first, readers = tl.load(first_ptr + task), tl.load(readers_ptr + task)
    prefix_len = tl.load(lens_ptr + task)
    # Starts are multiples of 16 (types.ALIGNMENT); a value read from memory has no alignment unless it is told.
    prefix_start = tl.multiple_of(tl.load(starts_ptr + task), 16).to(tl.int64)
    last = tl.minimum(slot + BLOCK_N, prefix_len)  # excluded

    # The first queries of each row are those that see the tile: all, unless there is a window.
    seeing = q_len
    if window is not None:
        shortest = tl.full([], NO_LIMIT, tl.int32)
        for r in tl.range(first, first + readers):
            own_end = kv_capacity
            if kv_len_ptr is not None:
                own_end = tl.load(kv_len_ptr + tl.load(order_ptr + r).to(tl.int64) * stride_kv_len)
            shortest = tl.minimum(shortest, own_end)
        seeing = tl.minimum(q_len, tl.maximum(window + last - 1 - prefix_len - (shortest - q_len), 0))

    k = load_keys(prefix_k_ptr + (prefix_start * stride_prefix_k_seq + h64 * stride_prefix_k_head) * ALIGN,
                  stride_prefix_k_seq, stride_prefix_k_dim, slot, last, True, HEAD_DIM, ALIGN, BLOCK_N,
                  BLOCK_D)  # fmt: skip
    v = load_keys(prefix_v_ptr + (prefix_start * stride_prefix_v_seq + h64 * stride_prefix_v_head) * ALIGN,
                  stride_prefix_v_seq, stride_prefix_v_dim, slot, last, True, HEAD_DIM, ALIGN, BLOCK_N,
                  BLOCK_D)  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    offs_n = slot + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    total = readers * seeing * GROUP
    query_tiles = tl.cdiv(total, BLOCK_M)
    per_part = tl.cdiv(query_tiles, parts)
    begin = part * per_part
    for n in tl.range(begin, tl.minimum(begin + per_part, query_tiles)):
        rows = n * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], as all below
        mask_m = rows < total
        b64 = tl.load(order_ptr + first + rows // (seeing * GROUP), mask=mask_m, other=0).to(tl.int64)
        rows = rows % (seeing * GROUP)
        i64, g64 = (rows // GROUP).to(tl.int64), h64 * GROUP + rows % GROUP
        rows_q = (b64 * stride_q_batch + g64 * stride_q_head + i64 * stride_q_seq) * ALIGN
        rows_do = (b64 * stride_do_batch + g64 * stride_do_head + i64 * stride_do_seq) * ALIGN
        rows_lse = (b64 * kv_heads + kv_head) * (q_len * GROUP) + rows
        slots_end = kv_capacity - q_len + rows // GROUP
        query = slots_end
        if kv_len_ptr is not None:
            query = tl.load(kv_len_ptr + b64 * stride_kv_len, mask=mask_m, other=0) - q_len + rows // GROUP
        bias = open_bias(bias_ptr, stride_bias_head, stride_bias_entry, bias_reach, bias_scale, g64[None, :],
                         (slots_end if BIAS_OF_SLOTS else query)[None, :])  # fmt: skip
        visible = None
        if window is not None:
            visible = query[None, :] + prefix_len - offs_n[:, None] < window  # [BLOCK_N, BLOCK_M]
        dk, dv = add_queries(
            dk, dv, k, v, visible, rows_q, rows_do, rows_lse, mask_m, q_ptr, do_ptr, lse_ptr, delta_ptr,
            stride_q_dim, stride_do_dim, scale_log2, softcap_inner, bias, (offs_n - prefix_len)[:, None],
            HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D)  # fmt: skip

    part64 = part.to(tl.int64)
    dk_ptr += (part64 * stride_dk_batch + h64 * stride_dk_head + prefix_start * stride_dk_seq) * ALIGN
    dv_ptr += (part64 * stride_dv_batch + h64 * stride_dv_head + prefix_start * stride_dv_seq) * ALIGN
    store_keys(dk * scale, dk_ptr, stride_dk_seq, stride_dk_dim, slot, last, slot, last,
               HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D)  # fmt: skip
    store_keys(dv, dv_ptr, stride_dv_seq, stride_dv_dim, slot, last, slot, last,
               HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D)  # fmt: skip


def own_key_gradients(
    operands: Operands, do: Tensor, lse: Tensor, delta: Tensor, config: TileConfig | None = None
) -> tuple[Tensor, Tensor]:
    """dk and dv of the rows' own keys, in the layouts of k and v; do, lse and delta are `backward.saved_rows`."""
    config = config or operands.layout.config("backward_dkv")
    dk, dv = torch.empty_like(operands.k), torch.empty_like(operands.v)
    if dk.numel() == 0:
        return dk, dv
    key_tiles = cdiv(operands.k.shape[2], config.block_n)
    backward_own_kernel[(key_tiles * operands.kv_heads * operands.batch,)](
        **strided(q=operands.q, k=operands.k, v=operands.v, do=do, dk=dk, dv=dv),
        **operands.row_arguments(), **backward_scales(operands.scale, operands.softcap),
        lse_ptr=lse, delta_ptr=delta, key_tiles=key_tiles,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=padded_head_dim(operands.head_dim),
        num_warps=config.num_warps, num_stages=config.num_stages, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return dk, dv


def bank_gradients(
    operands: Operands, do: Tensor, lse: Tensor, delta: Tensor, config: TileConfig | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv of the whole bank, ``[kv_heads, tokens, head_dim]``; do, lse, delta as in `own_key_gradients`.

    ``parts`` of each sum follow from shapes by default. Nothing is read back from the device.
    """
    config = config or operands.layout.config("backward_dkv")
    prefix_k, prefix_v = operands.prefix.k, operands.prefix.v
    tables = bank_tiles(operands, config.block_n)
    tiles = tables.tile_task.shape[0]
    if tiles == 0 or prefix_k.numel() == 0:
        return torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
    if parts is None:
        queries = operands.batch * operands.q_len * operands.group
        at_once = Residency.of("backward_dkv", config, operands.head_dim, operands.q.dtype, prefix_k.device)
        query_tiles = cdiv(queries, config.block_m)
        parts = choose_chunks(tiles * operands.kv_heads, query_tiles, at_once, MERGE_TILES)
        parts = min(parts, max(1, query_tiles // MIN_TILES))
    dtype = prefix_k.dtype if parts == 1 else torch.float32
    dk, dv = (torch.zeros((parts, *x.shape), dtype=dtype, device=x.device) for x in (prefix_k, prefix_v))
    rows = operands.row_arguments()
    unused = ("task_ids_ptr", "kv_start_ptr", "stride_task_ids", "stride_kv_start", "num_tasks", "CAUSAL")
    backward_bank_kernel[(tiles * operands.kv_heads * parts,)](
        **strided(q=operands.q, prefix_k=prefix_k, prefix_v=prefix_v, do=do, dk=dk, dv=dv),
        **{name: value for name, value in rows.items() if name not in unused},
        **{f"{name}_ptr": table for name, table in tables._asdict().items()},
        **backward_scales(operands.scale, operands.softcap),
        lse_ptr=lse, delta_ptr=delta, tiles=tiles, parts=parts,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=padded_head_dim(operands.head_dim),
        num_warps=config.num_warps, num_stages=config.num_stages, **LAUNCH_OPTIONS,
    )  # fmt: skip
    if parts == 1:
        return dk[0], dv[0]
    return dk.sum(0).to(prefix_k.dtype), dv.sum(0).to(prefix_v.dtype)


class BankTiles(NamedTuple):
    """Which rows read which tiles of the bank; int32, on the device.

    Attributes:
        order: ``[batch]``; the rows, task by task, in index order within each.
        first, readers: ``[tasks]``; where a task's rows begin in ``order``, and how many they are.
        tile_task, tile_slot: ``[tiles]``; the task of each tile of the prefixes in use, and the first of its slots;
            task -1 for a tile that is not used.
    """

    order: Tensor
    first: Tensor
    readers: Tensor
    tile_task: Tensor
    tile_slot: Tensor


def bank_tiles(operands: Operands, block_n: int) -> BankTiles:
    """The tables for tiles of ``block_n`` slots; shapes are those of the worst case, so that the host need not wait."""
    ids, lens, batch = operands.task_ids, operands.prefix.lens, operands.batch
    tasks, tokens = lens.shape[0], operands.prefix.k.shape[1]
    sound = (ids >= 0) & (ids < tasks)  # the others are NaN in the forward pass, and have no gradient
    if operands.kv_len is not None:
        sound &= (operands.kv_len >= 0) & (operands.kv_len <= operands.kv_capacity)
    if operands.kv_start is not None:
        sound &= (operands.kv_start >= 0) & (operands.kv_start <= operands.kv_capacity)
    ids, order = torch.sort(torch.where(sound, ids, tasks), stable=True)
    every = torch.arange(tasks, dtype=ids.dtype, device=ids.device)
    first = torch.searchsorted(ids, every)
    readers = torch.searchsorted(ids, every, right=True) - first

    needed = torch.where(readers > 0, (lens.clamp(min=0) + block_n - 1) // block_n, 0)
    ends = torch.cumsum(needed, 0)
    in_use = min(batch, tasks)
    most = min((tokens + in_use * (block_n - 1)) // block_n, in_use * cdiv(tokens, block_n))
    tile = torch.arange(most, dtype=ends.dtype, device=ids.device)
    task = torch.searchsorted(ends, tile, right=True)
    used, task = task < tasks, task.clamp(max=tasks - 1)
    slot = (tile - (ends - needed)[task]) * block_n
    return BankTiles(order.int(), first.int(), readers.int(), torch.where(used, task, -1).int(), slot.int())
