"""Pieces shared by every kernel: the product, the online softmax in base 2, what a query sees, merge weights.

    x = scale * q @ k^T [+ bias]          s = log2(e) * x          [s = log2(e) * softcap * tanh(x / softcap)]
    r' = max(r, max_j s_j)    l' = 2^(r - r') l + sum_j 2^(s_j - r')    acc' = 2^(r - r') acc + 2^(s - r') @ v

A state (acc, row_sum = l, row_max = r) that has seen no key is (0, 0, -inf); it normalises to 0 with lse = -inf.
Inside the kernels every log-sum-exp is in base 2; only what leaves the package is in nats.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_LIMIT = tl.constexpr(2**31 - 1)

# Triton decides at decoration time whether kernels are interpreted, so this holds for the life of the process.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def runtime_jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit` that never recompiles for another length, batch or stride.

    Triton specialises integers that are 1 or multiples of 16. Here only ``stride_*_dim`` may (1 means contiguous);
    alignment of the other strides comes from ``ALIGN``: they are passed in units of ALIGN elements.
    """
    names = [p.name for p in inspect.signature(fn).parameters.values()]
    fixed = [n for n in names if not n.endswith(("_ptr", "_dim")) and n != n.upper()]
    return triton.jit(fn, do_not_specialize=fixed)


@triton.jit
def dot(a, b, acc=None):
    """``acc + a @ b`` in float32; full float32 products for float32 operands.

    The interpreter's own product is wrong for bfloat16 (it multiplies the bit patterns), and in float32 its bits depend
    on the processor and on where a row stands: it is made in float64, and rounded once.
    """
    if INTERPRETED:
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
        return product if acc is None else acc + product
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """``x`` (float32) rounded to DTYPE, to nearest even: the interpreter would cut a bfloat16 off instead."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        rounded = (bits >> 16).to(tl.uint16)
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """``tanh(x) = sign(x) (1 - e) / (1 + e)`` with ``e = exp(-2 |x|)``, which never overflows.

    PRECISE adds the odd series below 1/4, where ``1 - e`` cancels: float32 keeps its relative accuracy there.
    """
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    y = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0, -y, y)
    if PRECISE:
        x2 = x * x
        series = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
        y = tl.where(x2 < 0.0625, series, y)
    return y


@triton.jit
def load_keys(ptr, stride_seq, stride_dim, start, end, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
              ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr = 1):  # fmt: skip
    """Rows ``start .. start + BLOCK_N`` of a ``[seq, HEAD_DIM]`` matrix; 0 from ``end`` on (if MASKED) and beyond
    HEAD_DIM.

    ``[BLOCK_N, BLOCK_D]``; in slices, ``[SLICES, BLOCK_N / SLICES, BLOCK_D]``; of several matrices, if ptr, start and
    end are ``[ROWS, 1, 1]``, ``[ROWS, BLOCK_N, BLOCK_D]``.

    Offsets within the tile are 32 bits wide, which saves registers; the backend refuses strides too large for that.
    """
    offs_n = tl.expand_dims(tile_keys(BLOCK_N, SLICES), -1)  # [(SLICES,) keys, 1]
    offs_d = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    ptr += start.to(tl.int64) * stride_seq * ALIGN
    ptrs = ptr + (offs_n * (stride_seq * ALIGN) + offs_d * stride_dim)
    if MASKED and HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=(start + offs_n < end) & (offs_d < HEAD_DIM), other=0.0)
    if MASKED:
        return tl.load(ptrs, mask=start + offs_n < end, other=0.0)
    if HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=offs_d < HEAD_DIM, other=0.0)
    return tl.load(ptrs)


@triton.jit
def tile_keys(BLOCK_N: tl.constexpr, SLICES: tl.constexpr):
    """``0 .. BLOCK_N``, as ``[BLOCK_N]`` or ``[SLICES, BLOCK_N / SLICES]``."""
    keys = tl.arange(0, BLOCK_N // SLICES)
    if SLICES > 1:
        keys = tl.arange(0, SLICES)[:, None] * (BLOCK_N // SLICES) + keys[None, :]
    return keys


@triton.jit
def softmax_update(acc, row_sum, row_max, scores, v, scale_log2, MASKED: tl.constexpr):
    """One step of the online softmax (module docstring); ``scale_log2 > 0``; if MASKED, scores may be -inf.

    Shapes are those of one state; where each slice or row has its own, there is one axis more in front.
    """
    LAST: tl.constexpr = len(scores.shape) - 1
    top = tl.maximum(row_max, tl.max(scores, LAST) * scale_log2)  # [BLOCK_M]
    shift = top
    if MASKED:
        shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores * scale_log2 - tl.expand_dims(shift, LAST))  # [BLOCK_M, BLOCK_N]
    decay = tl.exp2(row_max - shift)  # [BLOCK_M]
    row_sum = row_sum * decay + tl.sum(weights, LAST)
    acc = dot(cast(weights, v.dtype), v, acc * tl.expand_dims(decay, LAST))
    return acc, row_sum, top


@triton.jit
def visible_keys(start, end, first, last, BLOCK_N: tl.constexpr, SLICES: tl.constexpr = 1):
    """Which of the keys of a tile (`load_keys`) are before ``end`` and in each query's ``first .. last``.

    first, last: ``[(ROWS,) BLOCK_M]``, or None where there is no such limit. Returns
    ``[(SLICES or ROWS,) BLOCK_M or 1, keys]``.
    """
    offs_n = start + tl.expand_dims(tile_keys(BLOCK_N, SLICES), -2)  # [(SLICES or ROWS,) 1, keys]
    visible = offs_n < end
    if last is not None:
        visible = visible & (offs_n <= tl.expand_dims(last, -1))
    if first is not None:
        visible = visible & (offs_n >= tl.expand_dims(first, -1))
    return visible


@triton.jit
def open_bias(bias_ptr, stride_bias_head, stride_bias_entry, bias_reach, bias_scale, offs_h, query):
    """What `bias_scores` needs of a tile's queries, a column or a row of them; None without a bias.

    That is ``(ptrs, query, stride, reach, scale)``: where the entry of distance 0 of each query's head lies; where the
    query stands among its row's own slots; the step to the next distance; the largest distance; and what entries are
    multiplied by.
    """
    bias = None
    if bias_ptr is not None:
        ptrs = bias_ptr + offs_h * stride_bias_head + bias_reach * stride_bias_entry
        bias = (ptrs, query, stride_bias_entry, bias_reach, bias_scale)
    return bias


@triton.jit
def bias_scores(bias, key):
    """What a relative bias adds to the scores of the queries of ``bias`` (`open_bias`), ``[BLOCK_M, BLOCK_N]`` or
    transposed.

    key: where each key stands, the row's first own slot being 0 and the last of its prefix -1; a row or a column.
    """
    distance = tl.minimum(tl.maximum(key - bias[1], -bias[3]), bias[3])
    return tl.load(bias[0] + distance * bias[2]).to(tl.float32) * bias[4]


@triton.jit
def finish_scores(products, softcap_inner, bias, key, PRECISE: tl.constexpr):
    """Scores but for ``scale_log2``, from ``q @ k``: with a relative bias (`bias_scores`) and a softcap if given."""
    if softcap_inner is not None:
        products *= softcap_inner
    if bias is not None:
        products += bias_scores(bias, key)
    if softcap_inner is not None:
        products = tanh(products, PRECISE)
    return products


@triton.jit
def attend_keys(acc, row_sum, row_max, q, start, end, first, last, keys, scale_log2, softcap_inner, bias, key_shift,
                MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D: tl.constexpr, SLICES: tl.constexpr = 1):  # fmt: skip
    """The state after keys ``start .. start + BLOCK_N``; from ``end`` on none is loaded (if MASKED).

    Args:
        q: ``[(SLICES or ROWS,) BLOCK_M, BLOCK_D]``; start, end: scalars, or ``[ROWS, 1, 1]`` as in `load_keys`.
        first, last: the first and the last key each query sees, ``[(ROWS,) BLOCK_M]``, or None where nothing but
            ``end`` limits them; used if MASKED.
        keys: ``(k_ptr, v_ptr, stride_k_seq, stride_k_dim, stride_v_seq, stride_v_dim)``.
        bias: `open_bias` of a column of queries.
        key_shift: how much further a query stands from these keys than it would from the row's own: 0, or the length of
            the prefix.
    """
    k = load_keys(keys[0], keys[2], keys[3], start, end, MASKED, HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D, SLICES)
    key = start - key_shift + tl.expand_dims(tile_keys(BLOCK_N, SLICES), -2)  # [(SLICES or ROWS,) 1, keys]
    scores = finish_scores(dot(q, tl.trans(k)), softcap_inner, bias, key, q.dtype == tl.float32)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        scores = tl.where(visible_keys(start, end, first, last, BLOCK_N, SLICES), scores, float("-inf"))
    v = load_keys(keys[1], keys[4], keys[5], start, end, MASKED, HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D, SLICES)
    # An entry of a bias may be -inf, or become so when it is divided by the scale.
    return softmax_update(acc, row_sum, row_max, scores, v, scale_log2, MASKED or bias is not None)


@triton.jit
def empty_state(q):
    """``(acc, row_sum, row_max)`` of a tile of queries that has seen no key."""
    ROWS: tl.constexpr = q.shape[:-1]
    return tl.zeros(q.shape, tl.float32), tl.zeros(ROWS, tl.float32), tl.full(ROWS, float("-inf"), tl.float32)


@triton.jit
def slice_queries(q, SLICES: tl.constexpr):
    """``q`` for each of SLICES: ``[SLICES, BLOCK_M, BLOCK_D]``, or as it is for one."""
    if SLICES > 1:
        q = tl.broadcast_to(q[None, :, :], [SLICES, q.shape[0], q.shape[1]])
    return q


@triton.jit
def join_slices(acc, row_sum, row_max):
    """One state of the states of the slices, or of the one there is."""
    if len(acc.shape) == 3:
        top = tl.max(row_max, 0)  # [BLOCK_M]
        shift = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(row_max - shift[None, :])  # [SLICES, BLOCK_M]
        acc, row_sum, row_max = sum_slices(acc * weights[:, :, None]), tl.sum(row_sum * weights, 0), top
    return acc, row_sum, row_max


@triton.jit
def sum_slices(x):
    """``tl.sum(x, 0)`` of ``[SLICES, BLOCK_M, BLOCK_D]``: as halves that are added, which needs no shuffles."""
    x = tl.permute(x, (1, 2, 0))
    for _ in tl.static_range(5):  # at most 32 slices
        if x.shape[2] > 1:
            even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
            x = even + odd
    return tl.reshape(x, [x.shape[0], x.shape[1]])


@triton.jit
def select_keys(own, own_end, prefix_end, prefix_len, own_keys, prefix_keys):
    """``(keys, end, key_shift)``, as in `attend_keys`, of the row's own keys (if ``own``) or its prefix."""
    keys = (
        tl.where(own, own_keys[0], prefix_keys[0]), tl.where(own, own_keys[1], prefix_keys[1]),
        tl.where(own, own_keys[2], prefix_keys[2]), tl.where(own, own_keys[3], prefix_keys[3]),
        tl.where(own, own_keys[4], prefix_keys[4]), tl.where(own, own_keys[5], prefix_keys[5]),
    )  # fmt: skip
    return keys, tl.where(own, own_end, prefix_end), tl.where(own, 0, prefix_len)


@triton.jit
def attend_tile(acc, row_sum, row_max, q, query, start, own_end, prefix_end, prefix_len, own, own_keys, prefix_keys,
                window, scale_log2, softcap_inner, bias,
                MASKED: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr = 1):  # fmt: skip
    """`attend_keys` for a tile of the row's own keys (if ``own``) or of its prefix.

    Both kinds of tile run through one loop, told apart by scalars, so that loads of the first own tile are already
    in flight while the last prefix tile is computed; two loops would drain the pipeline in between.

    Args:
        q: ``[(SLICES,) BLOCK_M, BLOCK_D]``; query: ``[BLOCK_M]``, ``past + i``; among prefix slots it stands prefix_len
            further.
        own_end, prefix_end: one past the last key of each kind that may be loaded.
        own_keys, prefix_keys, bias: as in `attend_keys`.
    """
    keys, end, key_shift = select_keys(own, own_end, prefix_end, prefix_len, own_keys, prefix_keys)
    first = query + key_shift - window + 1 if window is not None else None  # [BLOCK_M]
    last = tl.where(own, query, NO_LIMIT) if CAUSAL else None  # [BLOCK_M]
    return attend_keys(acc, row_sum, row_max, q, start, end, first, last, keys, scale_log2, softcap_inner, bias,
                       key_shift, MASKED, HEAD_DIM, ALIGN, BLOCK_N, BLOCK_D, SLICES)  # fmt: skip


@triton.jit
def load_row(b, task_ids_ptr, stride_task_ids, starts_ptr, lens_ptr, kv_start_ptr, stride_kv_start, kv_len_ptr,
             stride_kv_len, num_tasks, kv_capacity):  # fmt: skip
    """What row ``b`` attends to: ``(prefix_start, prefix_len, own_start, own_end, broken)``.

    A row is broken when its task id is neither -1 nor a live task, or a key bound lies outside the keys. It gets no
    keys at all, least of all those of another task, and its output is NaN.
    """
    b = b.to(tl.int64)
    own_start = 0
    own_end = kv_capacity
    if kv_start_ptr is not None:
        own_start = tl.load(kv_start_ptr + b * stride_kv_start)
    if kv_len_ptr is not None:
        own_end = tl.load(kv_len_ptr + b * stride_kv_len)
    task = tl.load(task_ids_ptr + b * stride_task_ids)
    known = (task >= 0) & (task < num_tasks)
    prefix_len = tl.load(lens_ptr + task, mask=known, other=0)
    # Starts are multiples of 16 (types.ALIGNMENT); a value read from memory has no alignment unless it is told.
    prefix_start = tl.multiple_of(tl.load(starts_ptr + task, mask=known, other=0), 16)
    broken = ((task != -1) & ~known) | (prefix_len < 0)
    broken = broken | (own_start < 0) | (own_start > kv_capacity) | (own_end < 0) | (own_end > kv_capacity)
    prefix_len = tl.where(broken, 0, prefix_len)
    own_start = tl.where(broken, 0, own_start)
    own_end = tl.where(broken, 0, own_end)
    return prefix_start, prefix_len, own_start, own_end, broken


@triton.jit
def open_row(
    b, kv_head, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr,
    task_ids_ptr, starts_ptr, lens_ptr, kv_start_ptr, kv_len_ptr,
    stride_k_batch, stride_k_head, stride_k_seq, stride_k_dim,
    stride_v_batch, stride_v_head, stride_v_seq, stride_v_dim,
    stride_prefix_k_head, stride_prefix_k_seq, stride_prefix_k_dim,
    stride_prefix_v_head, stride_prefix_v_seq, stride_prefix_v_dim,
    stride_task_ids, stride_kv_start, stride_kv_len, kv_capacity, num_tasks, ALIGN: tl.constexpr,
):  # fmt: skip
    """The keys of row b and one kv head: ``(own_keys, prefix_keys, own_start, own_end, prefix_len, broken)``."""
    prefix_start, prefix_len, own_start, own_end, broken = load_row(
        b, task_ids_ptr, stride_task_ids, starts_ptr, lens_ptr, kv_start_ptr, stride_kv_start, kv_len_ptr,
        stride_kv_len, num_tasks, kv_capacity)  # fmt: skip
    b = b.to(tl.int64)
    h = kv_head.to(tl.int64)
    start = prefix_start.to(tl.int64)
    own_keys = (
        k_ptr + (b * stride_k_batch + h * stride_k_head) * ALIGN,
        v_ptr + (b * stride_v_batch + h * stride_v_head) * ALIGN,
        stride_k_seq, stride_k_dim, stride_v_seq, stride_v_dim,
    )  # fmt: skip
    prefix_keys = (
        prefix_k_ptr + (start * stride_prefix_k_seq + h * stride_prefix_k_head) * ALIGN,
        prefix_v_ptr + (start * stride_prefix_v_seq + h * stride_prefix_v_head) * ALIGN,
        stride_prefix_k_seq, stride_prefix_k_dim, stride_prefix_v_seq, stride_prefix_v_dim,
    )  # fmt: skip
    return own_keys, prefix_keys, own_start, own_end, prefix_len, broken


@triton.jit
def again(x):
    """The scalar ``x``, as a value the compiler does not know to be x: grids have one program along axis 1.

    What follows from it behind a loop is worked out there, instead of filling registers during the loop.
    """
    return x + tl.program_id(1)


@triton.jit
def tile_of_program(query_tiles, kv_heads):
    """``(query_tile, kv_head, b)`` of a program with a tile of query rows.

    Tiles vary fastest, those with the most keys first: neighbours share their keys, and the short ones fill the end.
    """
    pid = tl.program_id(0)
    return query_tiles - 1 - pid % query_tiles, pid // query_tiles % kv_heads, pid // query_tiles // kv_heads


@triton.jit
def query_rows(query_tile, kv_head, q_len, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The (query, head) pairs of a tile, the GROUP heads of a query side by side: ``offs_i, offs_h, mask_m``."""
    rows = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    return rows // GROUP, kv_head * GROUP + rows % GROUP, rows < q_len * GROUP


@triton.jit
def add_sink(acc, row_sum, row_max, sink_log2):
    """The state after one more key with score ``sink_log2`` (``[BLOCK_M]``, base 2) and value 0."""
    top = tl.maximum(row_max, sink_log2)  # [BLOCK_M]
    shift = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp2(row_max - shift)
    return acc * decay[:, None], row_sum * decay + tl.exp2(sink_log2 - shift), top


@triton.jit
def partial_rows(chunk, kv_head, b, g, i, kv_heads, batch, q_len, GROUP: tl.constexpr):
    """Where query i of head ``kv_head * GROUP + g`` of row b has its partial result (`merge.Partials`); int64."""
    return (((chunk * kv_heads + kv_head.to(tl.int64)) * batch + b) * GROUP + g) * q_len + i


@triton.jit
def append_axes(x, AXES: tl.constexpr):
    """``x`` with AXES more axes after those it has; a scalar stays one."""
    for _ in tl.static_range(AXES):
        if len(x.shape) > 0:
            x = tl.expand_dims(x, -1)
    return x


@triton.jit
def normalise(acc, row_sum, row_max, broken):
    """``(acc / row_sum, lse in base 2)``; 0 and -inf for a state without keys; NaN for a broken row."""
    poison = tl.where(broken, float("nan"), 0.0)
    seen = tl.where(row_sum == 0, 1.0, row_sum)  # [BLOCK_M]
    lse = tl.where(row_sum == 0, float("-inf"), row_max + tl.log2(seen))
    return acc / tl.expand_dims(seen, -1) + append_axes(poison, 1), lse + poison


@triton.jit
def merge_weights(lse, sink_log2):
    """``(2^(lse - top), their sum, top)`` for partial results with base-2 ``lse`` ``[BLOCK_C]`` and an optional sink.

    Source: the merge of attention states, arXiv:2501.01005 section 2.2.
    """
    top = tl.max(lse, 0)
    if sink_log2 is not None:
        top = tl.maximum(top, sink_log2)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(lse - shift)  # [BLOCK_C]
    total = tl.sum(weights, 0)
    if sink_log2 is not None:
        total += tl.exp2(sink_log2 - shift)
    return weights, total, top


@triton.jit
def score_gradients(scores, dp, lse, delta, scale_log2, softcap_inner):
    """``p = 2^(s - lse)`` and ``dx = p (dp - delta)``, to be multiplied by the scale: a derivative by ``q @ k``.

    With a softcap dx takes the derivative of tanh.

    Args:
        scores: `finish_scores`, of which s is ``scale_log2`` times, of any sign; dp: ``dout @ v``; lse in base 2, +inf
            for a query whose p shall be 0; all broadcastable.

    Source: the backward pass of FlashAttention-2, arXiv:2307.08691 section 3.1.2.
    """
    p = tl.exp2(scores * scale_log2 - lse)
    dx = p * (dp - delta)
    if softcap_inner is not None:
        dx *= 1.0 - scores * scores
    return p, dx
