"""PyTorch's own attention, called so that a shared prefix is read once.

Three ways to the same result:

- **shared**: the queries of all rows of a task are packed into one call over the task's prefix; own keys are another
  call; the two are merged by their log-sum-exps in float32. For CPU decode, when a prefix has enough readers.
- **concatenated**: each row gets its own copy of its prefix in front of its keys, then one call.
- **formula**: `reference`, for what PyTorch's attention cannot express (softcap; gradients of lse or sinks).

The merge of two parts with outputs ``o`` and log-sum-exps ``l`` (nats):

    lse = log(exp(l1) + exp(l2))          out = exp(l1 - lse) o1 + exp(l2 - lse) o2

Source: arXiv:2402.05099 (shared-prefix decomposition), arXiv:1805.02867 (merging partial softmaxes).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prefix_attn.backends import reference
from prefix_attn.types import AttentionCall

Spans = tuple[tuple[int, int], ...]

# Where sharing starts to pay in decode on a CPU; measured by benchmarks/sharing.py, see benchmarks/README.md.
MIN_SHARED_TOKENS = 1024  # prefix tokens read by the batch that sharing saves


def refusal(call: AttentionCall) -> str | None:
    """PyTorch runs everything, on every device."""
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Out in q's dtype, and the log-sum-exp where it was asked for."""
    if call.q.numel() == 0:
        return torch.empty_like(call.q), call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    if call.batch_invariant and call.batch > 1:
        return reference.by_row(call, run)
    wants_lse = call.return_lse or call.sinks is not None
    on_cpu = call.q.device.type == "cpu"
    if call.softcap is not None or (wants_lse and (call.needs_grad or not on_cpu)):
        return reference.run(call)
    if call.needs_grad or not on_cpu:
        return _concatenated_sdpa(call), None
    batch = _Batch(call)
    out, lse = _shared(call, batch) if batch.sharing_pays else _concatenated(call, batch)
    if call.sinks is not None:
        with_sink = torch.logaddexp(lse, call.sinks.to(lse.dtype)[None, :, None])
        out, lse = out * torch.exp(lse - with_sink)[..., None], with_sink
    return out.to(call.q.dtype), lse


class _Batch:
    """What the host needs to know of a call on a CPU: who reads which prefix, and where each row's keys lie."""

    def __init__(self, call: AttentionCall) -> None:
        ids = tuple(call.task_ids.tolist())
        self.groups = _groups(ids, tuple(call.prefix.spans))
        starts = call.kv_start.tolist() if call.kv_start is not None else [0] * call.batch
        ends = call.kv_len.tolist() if call.kv_len is not None else [call.kv_capacity] * call.batch
        self.first, self.last = min(starts), max(max(ends), min(starts))
        self.aligned = min(ends) == self.last and max(starts) == self.first  # every row has the same own keys
        longest = max((m for _, m, _ in self.groups), default=0)
        self.hides_prefix = call.window is not None and longest + self.last > call.window
        self.windowed = call.window is not None and self.last - self.first > call.window
        saved = sum(m * (len(rows) - 1) for _, m, rows in self.groups)
        self.sharing_pays = not self.hides_prefix and saved >= MIN_SHARED_TOKENS


@lru_cache(maxsize=256)
def _groups(ids: tuple[int, ...], spans: Spans) -> list[tuple[int, int, Tensor]]:
    """``(start, length, rows)`` of each task that has a prefix and a row in the batch."""
    rows_of: dict[int, list[int]] = {}
    for row, task in enumerate(ids):
        if task >= 0 and spans[task][1] > 0:
            rows_of.setdefault(task, []).append(row)
    return [(*spans[task], torch.tensor(rows)) for task, rows in rows_of.items()]


def _shared(call: AttentionCall, batch: _Batch) -> tuple[Tensor, Tensor]:
    """One call per task over its prefix, one over all own keys, merged in float32."""
    own_out, own_lse = _own(call, batch)
    if not batch.groups:
        return own_out, own_lse
    group, q_len, dim = call.group, call.q_len, call.head_dim
    order = torch.cat([rows for _, _, rows in batch.groups])
    # [kv_heads, rows * group * q_len, D]: the queries of one kv head, task by task
    packed = call.q[order].transpose(0, 1).reshape(call.kv_heads, group, len(order), -1, dim)
    packed = packed.transpose(1, 2).reshape(call.kv_heads, -1, dim)
    parts, begin = [], 0
    for start, m, rows in batch.groups:
        end = begin + len(rows) * group * q_len
        pk, pv = (x[None, :, start : start + m] for x in (call.prefix.k, call.prefix.v))
        parts.append(_attend(packed[None, :, begin:end], pk, pv, call.scale))
        begin = end
    outs, lses = (torch.cat(x, dim=2)[0] for x in zip(*parts, strict=True))
    prefix_out = outs.view(call.kv_heads, len(order), group, q_len, dim).transpose(0, 1).flatten(1, 2)
    prefix_lse = lses.view(call.kv_heads, len(order), group, q_len).transpose(0, 1).flatten(1, 2)
    if len(order) < call.batch:
        out, lse = own_out.to(own_lse.dtype), own_lse.clone()
        out[order], lse[order] = merge(own_out[order], own_lse[order], prefix_out, prefix_lse)
        return out, lse
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return merge(own_out, own_lse, prefix_out[inverse], prefix_lse[inverse])


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys; ``out [..., D]``, ``lse [...]``; the result is in lse's dtype."""
    lse = torch.logaddexp(lse1, lse2)
    safe = lse.masked_fill(lse == float("-inf"), 0.0)
    w1, w2 = torch.exp(lse1 - safe)[..., None], torch.exp(lse2 - safe)[..., None]
    return w1 * out1 + w2 * out2, lse


def _own(call: AttentionCall, batch: _Batch) -> tuple[Tensor, Tensor]:
    """Attention over the rows' own keys."""
    k, v = (x[:, :, batch.first : batch.last] for x in (call.k, call.v))
    if batch.aligned and not batch.windowed:
        if call.q_len == 1 or not call.causal:
            return _attend_grouped(call.q, k, v, call.scale)
        if call.q_len == k.shape[2]:
            return _attend(call.q, k, v, call.scale, causal=True)
    no_prefix = torch.zeros_like(call.task_ids)
    mask = reference.visible(call, 0, no_prefix)[..., batch.first : batch.last]  # [B, 1, Q, N]
    return _attend_grouped(call.q, k, v, call.scale, mask)


def _concatenated(call: AttentionCall, batch: _Batch) -> tuple[Tensor, Tensor]:
    """Copy each row's prefix in front of its keys, then one call."""
    if not batch.groups:
        return _own(call, batch)
    pk, pv, m = reference.gather_prefix(call.prefix, call.task_ids)
    k = torch.cat([pk, call.k[:, :, : batch.last]], dim=2)
    v = torch.cat([pv, call.v[:, :, : batch.last]], dim=2)
    same_prefix = len(batch.groups) == 1 and len(batch.groups[0][2]) == call.batch
    everything = same_prefix and batch.aligned and batch.first == 0 and call.window is None
    if everything and (call.q_len == 1 or not call.causal):
        return _attend_grouped(call.q, k, v, call.scale)
    mask = reference.visible(call, pk.shape[2], m)[..., : k.shape[2]]
    return _attend_grouped(call.q, k, v, call.scale, mask)


def _concatenated_sdpa(call: AttentionCall) -> Tensor:
    """The concatenated way through the public, differentiable operator; it has no log-sum-exp."""
    pk, pv, m = reference.gather_prefix(call.prefix, call.task_ids)
    mask = reference.visible(call, pk.shape[2], m)  # [B, 1, Q, M + N]
    unread = ~mask.any(dim=2)[..., None]  # [B, 1, M + N, 1]
    k = torch.cat([pk, call.k], dim=2).masked_fill(unread, 0.0)
    v = torch.cat([pv, call.v], dim=2).masked_fill(unread, 0.0)
    if k.shape[2] == 0:
        return torch.zeros_like(call.q)
    out = scaled_dot_product_attention(call.q, k, v, attn_mask=mask, scale=call.scale, enable_gqa=call.group > 1)
    return out.masked_fill(~mask.any(dim=3)[..., None], 0.0)


def _attend_grouped(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`_attend`; in decode, the query heads of a kv head become the queries of one matrix product."""
    if q.shape[2] > 1 or q.shape[1] == k.shape[1]:
        return _attend(q, k, v, scale, mask)
    out, lse = _attend(q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]), k, v, scale, mask)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """PyTorch's CPU flash attention with what it leaves to the caller: no keys, rows that see none, NaN in hidden keys.

    mask: bool ``[B, 1, Q or 1, N]``, True = visible. Returns out ``[B, H, Q, D]`` and lse ``[B, H, Q]``.
    """
    if k.shape[2] == 0:  # the operator kills the process
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=lse_dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    bias = None
    if mask is not None:
        bias = q.new_zeros(()).where(mask, float("-inf")).expand(-1, -1, q.shape[2], -1)
    out, lse = flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if mask is None:
        return out, lse
    if out.isnan().any():  # 0 * NaN: something unreadable lies in hidden keys; blank it and look again
        unread = ~mask.any(dim=2)[..., None]
        out, lse = flash(q, k.masked_fill(unread, 0.0), v.masked_fill(unread, 0.0), 0.0, causal, attn_mask=bias, scale=scale)
    return out, lse.masked_fill(~mask.any(dim=3), float("-inf"))  # the operator says 0 for a row that sees nothing
