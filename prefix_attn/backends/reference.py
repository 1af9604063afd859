"""The formula, literally: every row's ``[prefix ; own keys]`` is built, masked and put through a softmax.

    s = scale * q @ [pk; k]^T          s = softcap * tanh(s / softcap)          s[hidden] = -inf
    lse = log(sum(exp(s)) [+ exp(sink)])          out = exp(s - lse) @ [pv; v]          (natural log)

A query that sees nothing has lse = -inf and out = 0. Computed in ``dtype`` (float64 makes it the oracle of every
test), differentiable by autograd, as large as the batch times the longest prefix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefix_attn.types import AttentionCall, PrefixKV


def refusal(call: AttentionCall) -> str | None:
    """The reference runs everything, on every device."""
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Out in q's dtype and lse, computed in float32, or in float64 for float64 inputs."""
    if call.batch_invariant and call.batch > 1:
        return by_row(call, run)
    compute = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    out, lse = attend(call, compute)
    return out.to(call.q.dtype), lse


def by_row(
    call: AttentionCall, run: Callable[[AttentionCall], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """Run each row as a batch of one, cut to the keys it may read: its bits cannot depend on the other rows."""
    outs, lses = zip(*(run(call.row(b)) for b in range(call.batch)), strict=True)
    return torch.cat(outs), None if lses[0] is None else torch.cat(lses)


def attend(call: AttentionCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a call, everything in ``dtype``."""
    pk, pv, m = gather_prefix(call.prefix, call.task_ids)  # [B, Hkv, M, D] x 2, [B]
    hidden = ~visible(call, pk.shape[2], m)  # [B, 1, Q, M + N]
    unread = hidden.all(dim=2)[..., None]  # [B, 1, M + N, 1]: keys that no query sees may hold anything
    k = torch.cat([pk, call.k], dim=2).to(dtype)
    v = torch.cat([pv, call.v], dim=2).to(dtype)
    k, v = (x.masked_fill(unread, 0.0).repeat_interleave(call.group, dim=1) for x in (k, v))

    s = call.scale * (call.q.to(dtype) @ k.transpose(2, 3))  # [B, H, Q, M + N]
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    s = s.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(s, dim=3) if s.shape[3] else s.new_full(s.shape[:3], float("-inf"))  # [B, H, Q]
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.to(dtype)[None, :, None])
    p = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return p @ v, lse


def gather_prefix(prefix: PrefixKV, task_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's own copy of its prefix, padded to the longest: ``[B, kv_heads, M, D]`` x 2, and lengths ``[B]``."""
    has_task = task_ids >= 0
    task = task_ids.clamp(min=0).long()
    m = torch.where(has_task, prefix.lens[task], 0)
    slots = torch.arange(int(m.max()) if len(m) else 0, device=m.device)
    index = torch.where(slots < m[:, None], prefix.starts[task][:, None] + slots, 0).long()  # [B, M]
    return prefix.k[:, index].transpose(0, 1), prefix.v[:, index].transpose(0, 1), m


def visible(call: AttentionCall, prefix_slots: int, m: Tensor) -> Tensor:
    """Which of ``[prefix slots ; own slots]`` each query sees; bool ``[B, 1, Q, M + N]``. m: ``[B]`` prefix lengths."""
    device, n = call.q.device, call.kv_capacity
    end = call.kv_len if call.kv_len is not None else m.new_full((call.batch,), n)
    start = call.kv_start if call.kv_start is not None else torch.zeros_like(end)
    m, start, end = (x[:, None, None] for x in (m, start, end))  # [B, 1, 1]
    query = end - call.q_len + torch.arange(call.q_len, device=device)[:, None]  # [B, Q, 1]: past + i
    slot = torch.arange(prefix_slots, device=device)
    key = torch.arange(n, device=device)
    sees_slot = (slot < m).expand(-1, call.q_len, -1)
    sees_key = ((key >= start) & (key < end)).expand(-1, call.q_len, -1)
    if call.causal:
        sees_key = sees_key & (key <= query)
    if call.window is not None:
        sees_slot = sees_slot & (m + query - slot < call.window)
        sees_key = sees_key & (query - key < call.window)
    return torch.cat([sees_slot, sees_key], dim=2)[:, None]
