"""PyTorch's own attention, called so that a shared prefix is read once.

Three ways to the same result:

- **shared**: the queries of all rows of a task are packed into one call over the task's prefix; own keys are another
  call; the two are merged (by_task.py). On a CPU: it copies nothing, and is faster where rows share a long prefix
  (measured: benchmarks/results/amd-epyc/sharing.md; where a compiler is, the backend `cpu` runs decode and prefill).
- **concatenated**: each row gets its own copy of its prefix in front of its keys, then one masked call. For several
  queries on a short prefix, where a window hides part of a prefix, and on other devices.
- **formula**: `reference`, for what PyTorch's attention cannot express (softcap; on other devices lse and sinks).

The backward of a part needs nothing but its keys and the out and lse of the whole, so on a CPU it is shared as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prefix_attn.backends import reference
from prefix_attn.backends.by_task import Readers, merge, readers_in, with_sinks
from prefix_attn.types import AttentionCall, Gradients, PerInput

#: On a CPU to group rows by task; elsewhere as the reference does.
READS_IDS = True

#: In prefill, prefixes of fewer tokens are copied: a second call and the merge cost more (measured in the same file).
COPIED_BELOW = 64

#: Of fewer keys without a bias, PyTorch's CPU flash attention takes scores that are all NaN for none: its maximum keeps
#: NaN in whole vectors only, and this is the widest.
VECTOR = 16


def refusal(call: AttentionCall) -> str | None:
    """PyTorch runs everything, on every device."""
    return None


def forward(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Out, and the log-sum-exp where it was asked for."""
    if call.batch_invariant and call.batch > 1:
        return reference.by_row(call, forward)
    on_cpu = call.q.device.type == "cpu"
    if call.softcap is not None or (not on_cpu and (call.return_lse or call.sinks is not None)):
        return reference.forward(call)
    if not on_cpu:
        return _concatenated_sdpa(call), None
    batch = _Batch(call)
    if batch.window_hides_prefixes(call):
        out, lse = _own(call, batch)
    elif batch.window_cuts_prefixes(call) or (call.q_len > 1 and batch.longest < COPIED_BELOW):
        out, lse = _concatenated(call, batch)
    else:
        out, lse = _shared(call, batch)
    return (out, lse) if call.sinks is None else with_sinks(out, lse, call.sinks)


def saves_lse(call: AttentionCall) -> bool:
    """Whether `backward` can use it: on a CPU, without a softcap."""
    return call.q.device.type == "cpu" and call.softcap is None


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
    needed: PerInput[bool],
) -> Gradients:  # fmt: skip
    """PyTorch's backward over each prefix and over own keys.

    The formula where the forward has no shared way, and for the gradients of lse and of a relative bias.
    """
    if lse is None or grad_lse is not None or needed.relative_bias or not saves_lse(call):
        return reference.backward(call, out, lse, grad_out, grad_lse, needed)
    batch = _Batch(call)
    hides = batch.window_hides_prefixes(call)
    if batch.window_cuts_prefixes(call) and not hides:
        return reference.backward(call, out, lse, grad_out, grad_lse, needed)
    rows = _Rows(call.q, grad_out, out, lse.masked_fill(lse == float("-inf"), 0.0))
    grad_q, grad_k, grad_v = _own_backward(call, batch, rows)
    grad_pk, grad_pv = (torch.zeros_like(x) for x in (call.prefix.k, call.prefix.v))
    if not hides:
        _prefix_backward(call, batch.readers, rows, grad_q, grad_pk, grad_pv)
    grad_sinks = None
    if call.sinks is not None:
        p_sink = torch.exp(call.sinks.to(lse.dtype)[None, :, None] - rows.lse)
        grad_sinks = -(p_sink * (out.to(lse.dtype) * grad_out).sum(3)).sum((0, 2))
    return PerInput(grad_q, grad_k, grad_v, grad_pk, grad_pv, grad_sinks, None)


class _Batch:
    """What the host needs to know of a call on a CPU: who reads which prefix, and where each row's keys lie."""

    def __init__(self, call: AttentionCall) -> None:
        self.readers = readers_in(call)
        self.longest = max((m for _, m, _ in self.readers.groups), default=0)
        starts = call.kv_start.tolist() if call.kv_start is not None else [0] * call.batch
        ends = call.kv_len.tolist() if call.kv_len is not None else [call.kv_capacity] * call.batch
        self.first, self.last = min(starts), max(max(ends), min(starts))
        self.shortest = min(ends)
        self.aligned = self.shortest == self.last and max(starts) == self.first  # every row has the same own keys
        self.windowed = call.window is not None and self.last - self.first > call.window

    def window_hides_prefixes(self, call: AttentionCall) -> bool:
        """Whether every query has left all of its prefix behind."""
        return call.window is not None and self.shortest - call.q_len + 1 >= call.window

    def window_cuts_prefixes(self, call: AttentionCall) -> bool:
        """Whether some query may be too far from some prefix token; the shared call has no mask for that."""
        return call.window is not None and self.longest + self.last > call.window


def _shared(call: AttentionCall, batch: _Batch) -> tuple[Tensor, Tensor]:
    """The prefixes, and all own keys, merged in float32."""
    own_out, own_lse = _own(call, batch)
    readers = batch.readers
    if not readers.groups:
        return own_out, own_lse
    out, lse = _prefixes(call, readers)
    if (rows := readers.order) is None:
        return merge(own_out, own_lse, out, lse)
    all_out, all_lse = own_out.to(own_lse.dtype), own_lse.clone()
    all_out[rows], all_lse[rows] = merge(own_out[rows], own_lse[rows], out, lse)
    return all_out, all_lse


def _prefixes(call: AttentionCall, readers: Readers) -> tuple[Tensor, Tensor]:
    """A call for each task's prefix: ``[rows, H, Q, D]`` and ``[rows, H, Q]``, task by task."""
    packed, parts, begin, per_row = _pack(call.q, call, readers), [], 0, call.group * call.q_len
    for start, m, rows in readers.groups:
        end = begin + rows * per_row
        pk, pv = (x[None, :, start : start + m] for x in (call.prefix.k, call.prefix.v))
        relative = None
        if call.relative_bias is not None:
            members = slice(begin // per_row, end // per_row)
            relative = _prefix_relative(call, readers.rows(call)[members], m)
        parts.append(_attend(packed[:, :, begin:end], pk, pv, call.scale, relative=relative))
        begin = end
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return _unpack(out, call), _unpack(lse[..., None], call)[..., 0]


def _pack(x: Tensor, call: AttentionCall, readers: Readers) -> Tensor:
    """``[B, H, Q, D]`` to ``[1, kv_heads, rows * group * Q, D]``: the queries of one kv head, task by task."""
    x = x if readers.order is None else x[readers.order]
    return x.reshape(len(x), call.kv_heads, -1, x.shape[3]).transpose(0, 1).flatten(1, 2)[None]


def _unpack(x: Tensor, call: AttentionCall) -> Tensor:
    """`_pack` backwards: ``[rows, H, Q, D]``, task by task."""
    rows = x.reshape(call.kv_heads, -1, call.group * call.q_len, x.shape[3]).transpose(0, 1)
    return rows.reshape(len(rows), call.q_heads, call.q_len, x.shape[3])


def _own(call: AttentionCall, batch: _Batch) -> tuple[Tensor, Tensor]:
    """Attention over the rows' own keys."""
    k, v = (x[:, :, batch.first : batch.last] for x in (call.k, call.v))
    mask, causal = _own_mask(call, batch)
    if causal:
        return _attend(call.q, k, v, call.scale, causal=True)
    return _attend_folded(call.q, k, v, call.scale, mask, _own_relative(call, batch))


def _own_mask(call: AttentionCall, batch: _Batch) -> tuple[Tensor | None, bool]:
    """What hides own keys ``first..last``: a mask ``[B, 1, Q, N]``, or nothing, or their order alone."""
    if batch.aligned and not batch.windowed:
        if call.q_len == 1 or not call.causal:
            return None, False
        in_order = call.q_len == batch.last - batch.first and call.relative_bias is None
        if in_order and call.scale > 0:  # PyTorch scales what it hid by order: 0 or less makes NaN and inf of its -inf
            return None, True
    no_prefix = torch.zeros_like(call.task_ids)
    return reference.visible(call, 0, no_prefix)[..., batch.first : batch.last], False


def _own_relative(call: AttentionCall, batch: _Batch) -> Tensor | None:
    """What a relative bias adds to the scores of own keys ``first..last``, ``[B, H, Q, N]``."""
    if call.relative_bias is None:
        return None
    return reference.relative_scores(call, 0, torch.zeros_like(call.task_ids))[..., batch.first : batch.last]


def _prefix_relative(call: AttentionCall, rows: Tensor, m: int) -> Tensor:
    """What a relative bias adds to the scores of a prefix of m tokens: ``[1, kv_heads, rows * group * Q, m]``."""
    assert call.relative_bias is not None
    reach = call.relative_bias.shape[1] // 2
    distance = torch.arange(-m, 0, device=rows.device) - reference.query_slots(call)[rows]  # [rows, Q, m]
    table = call.relative_bias.reshape(call.kv_heads, call.group, -1)
    scores: Tensor = table[:, :, distance.clamp(-reach, reach) + reach]  # [kv_heads, group, rows, Q, m]
    return scores.transpose(1, 2).flatten(1, 3)[None]


def _concatenated(call: AttentionCall, batch: _Batch) -> tuple[Tensor, Tensor]:
    """Copy each row's prefix in front of its keys, then one call."""
    groups = batch.readers.groups
    if not groups:
        return _own(call, batch)
    same_prefix = len(groups) == 1 and groups[0][2] == call.batch
    if same_prefix:
        start, length, _ = groups[0]
        m = torch.full_like(call.task_ids, length)
        pk, pv = (
            x[None, :, start : start + length].expand(call.batch, -1, -1, -1) for x in (call.prefix.k, call.prefix.v)
        )
    else:
        pk, pv, m = reference.gather_prefix(call.prefix, call.task_ids)
    everything = same_prefix and batch.aligned and batch.first == 0 and not batch.window_cuts_prefixes(call)
    k = torch.cat([pk, call.k[:, :, : batch.last]], dim=2)
    v = torch.cat([pv, call.v[:, :, : batch.last]], dim=2)
    relative = None
    if call.relative_bias is not None:
        relative = reference.relative_scores(call, pk.shape[2], m)[..., : k.shape[2]]
    if everything and (call.q_len == 1 or not call.causal):
        return _attend_folded(call.q, k, v, call.scale, relative=relative)
    mask = reference.visible(call, pk.shape[2], m)[..., : k.shape[2]]
    return _attend_folded(call.q, k, v, call.scale, mask, relative)


def _concatenated_sdpa(call: AttentionCall) -> Tensor:
    """The concatenated way through the public operator, which has no log-sum-exp."""
    pk, pv, m = reference.gather_prefix(call.prefix, call.task_ids)
    mask = reference.visible(call, pk.shape[2], m)  # [B, 1, Q, M + N]
    unread = ~mask.any(dim=2)[..., None]  # [B, 1, M + N, 1]
    k = torch.cat([pk, call.k], dim=2).masked_fill(unread, 0.0)
    v = torch.cat([pv, call.v], dim=2).masked_fill(unread, 0.0)
    if k.shape[2] == 0:
        return torch.zeros_like(call.q)
    bias, blind = mask, ~mask.any(dim=3)
    if call.relative_bias is not None:
        relative = reference.relative_scores(call, pk.shape[2], m).to(call.q.dtype)
        bias = relative.masked_fill(~mask, float("-inf"))
        blind = (bias == float("-inf")).all(dim=3)
    out = scaled_dot_product_attention(call.q, k, v, attn_mask=bias, scale=call.scale, enable_gqa=call.group > 1)
    return out.masked_fill(blind[..., None], 0.0)


def _attend_folded(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, relative: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`_attend`; in decode, the query heads of a kv head become the queries of one matrix product."""
    if q.shape[2] > 1 or q.shape[1] == k.shape[1]:
        return _attend(q, k, v, scale, mask, relative=relative)
    group = q.shape[1] // k.shape[1]
    if relative is not None:
        relative = relative.reshape(q.shape[0], k.shape[1], group, k.shape[2])
    grouped = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
    out, lse = _attend(grouped, k, v, scale, mask, relative=relative)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False,
    relative: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PyTorch's CPU flash attention with what it leaves to the caller: no keys, rows that see none, NaN in hidden keys.

    mask: bool ``[B, 1, Q or 1, N]``, True = visible; relative: ``[B, H, Q, N]``, added to the scores.
    Returns out ``[B, H, Q, D]`` and lse ``[B, H, Q]``.
    """
    if k.shape[2] == 0:  # the operator kills the process
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=lse_dtype)
    q, k, v = map(_side_by_side, (q, k, v))
    bias = _bias(mask, relative, q)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if k.shape[2] < VECTOR and bias is None and (lse == 0).any():  # as it is of no scores; a bias keeps NaN
        order = q.new_zeros(q.shape[2], k.shape[2])
        if causal:
            order = order.masked_fill(torch.ones_like(order, dtype=torch.bool).triu(1), float("-inf"))
        out, lse = flash(q, k, v, 0.0, attn_mask=order[None, None], scale=scale)
    if bias is None:
        return out, lse
    if mask is not None and out.isnan().any():
        # 0 * NaN: something unreadable lies in hidden keys; blank it and look again
        unread = ~mask.any(dim=2)[..., None]
        out, lse = flash(
            q, k.masked_fill(unread, 0.0), v.masked_fill(unread, 0.0), 0.0, causal, attn_mask=bias, scale=scale
        )
    blind = (bias == float("-inf")).all(dim=3)
    return out, lse.masked_fill(blind, float("-inf"))  # the operator says 0 for a row that sees nothing


def _side_by_side(x: Tensor) -> Tensor:
    """x, copied where the elements of a head lie apart: PyTorch's CPU flash attention takes their stride for 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias(mask: Tensor | None, relative: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores: a relative bias, and -inf where a bool mask hides a key; ``[B, 1 or H, Q, N]``."""
    if mask is None:
        return None if relative is None else relative.to(q.dtype)
    visible = q.new_zeros(()) if relative is None else relative.to(q.dtype)
    return visible.where(mask, float("-inf")).expand(-1, -1, q.shape[2], -1)


class _Rows(NamedTuple):
    """What the backward of every part needs of the queries: ``[B, H, Q, D]`` x 3, and lse ``[B, H, Q]``, finite."""

    q: Tensor
    grad_out: Tensor
    out: Tensor
    lse: Tensor


def _own_backward(call: AttentionCall, batch: _Batch, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, through own keys only, and of k and v."""
    own = slice(batch.first, batch.last)
    k, v = call.k[:, :, own], call.v[:, :, own]
    mask, causal = _own_mask(call, batch)
    if mask is not None:
        unread = ~mask.any(dim=2)[..., None]
        k, v = k.masked_fill(unread, 0.0), v.masked_fill(unread, 0.0)
    relative = _own_relative(call, batch)
    grad_q, grad_own_k, grad_own_v = _attend_backward(rows, k, v, call.scale, mask, causal, relative)
    grad_k, grad_v = torch.zeros_like(call.k), torch.zeros_like(call.v)
    grad_k[:, :, own], grad_v[:, :, own] = grad_own_k, grad_own_v
    return grad_q, grad_k, grad_v


def _prefix_backward(
    call: AttentionCall, readers: Readers, rows: _Rows, grad_q: Tensor, grad_pk: Tensor, grad_pv: Tensor
) -> None:
    """Add the gradients through the prefixes; those of a task's prefix come out summed over its rows."""
    if not readers.groups:
        return
    q, grad_out, out, lse = (_pack(x, call, readers) for x in (*rows[:3], rows.lse[..., None]))
    parts, begin, per_row = [], 0, call.group * call.q_len
    for start, m, count in readers.groups:
        these, span = slice(begin, begin + count * per_row), slice(start, start + m)
        begin = these.stop
        packed = _Rows(q[:, :, these], grad_out[:, :, these], out[:, :, these], lse[:, :, these, 0])
        pk, pv = call.prefix.k[None, :, span], call.prefix.v[None, :, span]
        relative = None
        if call.relative_bias is not None:
            members = slice(these.start // per_row, these.stop // per_row)
            relative = _prefix_relative(call, readers.rows(call)[members], m)
        part, part_k, part_v = _attend_backward(packed, pk, pv, call.scale, relative=relative)
        parts.append(part)
        grad_pk[:, span] += part_k[0]
        grad_pv[:, span] += part_v[0]
    grad = _unpack(torch.cat(parts, dim=2), call)
    if readers.order is None:
        grad_q += grad
    else:
        grad_q[readers.order] += grad


def _attend_backward(
    rows: _Rows, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False,
    relative: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v through the keys k alone."""
    if k.shape[2] == 0:
        return torch.zeros_like(rows.q), torch.zeros_like(k), torch.zeros_like(v)
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    q, k, v, out = map(_side_by_side, (rows.q, k, v, rows.out))
    bias = _bias(mask, relative, q)
    grads: tuple[Tensor, Tensor, Tensor] = flash_backward(
        rows.grad_out, q, k, v, out, rows.lse, 0.0, causal, attn_mask=bias, scale=scale
    )
    return grads
