"""The formula, literally: every row's ``[prefix ; own keys]`` is built, masked and put through a softmax.

    s = scale * q @ [pk; k]^T + relative_bias          s = softcap * tanh(s / softcap)          s[hidden] = -inf
    lse = log(sum(exp(s)) [+ exp(sink)])          out = exp(s - lse) @ [pv; v]          (natural log)

A query that sees nothing has lse = -inf and out = 0. Computed in ``dtype`` (float64 makes it the oracle of every
test), differentiable by autograd, as large as the batch times the longest prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.types import AttentionCall, Gradients, PerInput, PrefixKV

#: The longest prefix of the batch decides how much is gathered.
READS_IDS = True


def refusal(call: AttentionCall) -> str | None:
    """The reference runs everything, on every device."""
    return None


def forward(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Out in q's dtype and lse, computed in float32, or in float64 for float64 inputs."""
    if call.batch_invariant and call.batch > 1:
        return by_row(call, forward)
    out, lse = attend(call, call.lse_dtype)
    return out.to(call.q.dtype), lse


def by_row(
    call: AttentionCall, forward: Callable[[AttentionCall], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """Run each row as a batch of one, cut to the keys it may read: its bits cannot depend on the other rows."""
    outs, lses = zip(*(forward(call.row(b)) for b in range(call.batch)), strict=True)
    return torch.cat(outs), None if lses[0] is None else torch.cat(lses)


def saves_lse(call: AttentionCall) -> bool:
    """Its backward computes everything again."""
    return False


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
    needed: PerInput[bool],
) -> Gradients:  # fmt: skip
    """The formula's derivative, in float32, or in float64 for float64 inputs.

        ds = p * (dout @ v^T - sum(dout * out) + dlse)          with a softcap: ds *= 1 - (s / softcap)^2
        dv = p^T @ dout          dq = scale * ds @ k          dk = scale * ds^T @ q          drelative_bias = ds
        dsink = exp(sink - lse) * (dlse - sum(dout * out))

    Key heads sum over their group, a prefix over the rows that read it, an entry of the bias over its distance.
    """
    w = _weights(call, call.lse_dtype)
    q, grad_out = call.q.to(w.s.dtype), grad_out.to(w.s.dtype)
    grad_p = grad_out @ w.v.transpose(2, 3)
    rest = (w.p * grad_p).sum(3)  # sum(dout * out) - dlse, [B, H, Q]
    if grad_lse is not None:
        rest = rest - grad_lse
    grad_s = w.p * (grad_p - rest[..., None])
    if call.softcap is not None:
        grad_s = grad_s * (1 - (w.s / call.softcap).masked_fill(w.hidden, 0.0).square())
    grad_bias = None
    if call.relative_bias is not None and needed.relative_bias:
        grad_bias = _scatter_bias(call, grad_s)
    grad_s = call.scale * grad_s
    grad_k, grad_v = (
        (a.transpose(2, 3) @ b).reshape(call.batch, call.kv_heads, call.group, *a.shape[3:], call.head_dim).sum(2)
        for a, b in ((grad_s, q), (w.p, grad_out))
    )  # [B, Hkv, M + N, D] x 2
    slots = grad_k.shape[2] - call.kv_capacity
    grad_sinks = None
    if call.sinks is not None:
        p_sink = torch.exp(call.sinks.to(w.s.dtype)[None, :, None] - w.base)
        grad_sinks = -(p_sink * rest).sum((0, 2))
    return PerInput(
        q=grad_s @ w.k, k=grad_k[:, :, slots:], v=grad_v[:, :, slots:],
        prefix_k=_scatter_prefix(call, grad_k[:, :, :slots]) if needed.prefix_k else None,
        prefix_v=_scatter_prefix(call, grad_v[:, :, :slots]) if needed.prefix_v else None,
        sinks=grad_sinks, relative_bias=grad_bias,
    )  # fmt: skip


def attend(call: AttentionCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a call, everything in ``dtype``. Autograd can differentiate it."""
    w = _weights(call, dtype)
    return w.p @ w.v, w.lse


class _Weights(NamedTuple):
    """Scores and their softmax, ``[B, H, Q, M + N]``; with the keys and values of every query head."""

    s: Tensor
    p: Tensor
    lse: Tensor  # [B, H, Q]
    base: Tensor  # lse, 0 where it is -inf
    k: Tensor  # [B, H, M + N, D]; 0 where no query looks
    v: Tensor
    hidden: Tensor  # [B, 1, Q, M + N]


def _weights(call: AttentionCall, dtype: torch.dtype) -> _Weights:
    pk, pv, m = gather_prefix(call.prefix, call.task_ids)  # [B, Hkv, M, D] x 2, [B]
    hidden = ~visible(call, pk.shape[2], m)
    unread = hidden.all(dim=2)[..., None]  # [B, 1, M + N, 1]: keys that no query sees may hold anything
    k = torch.cat([pk, call.k], dim=2).to(dtype)
    v = torch.cat([pv, call.v], dim=2).to(dtype)
    k, v = (x.masked_fill(unread, 0.0).repeat_interleave(call.group, dim=1) for x in (k, v))

    s = call.scale * (call.q.to(dtype) @ k.transpose(2, 3))
    if call.relative_bias is not None:
        s = s + relative_scores(call, pk.shape[2], m).to(dtype)
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    s = s.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(s, dim=3) if s.shape[3] else s.new_full(s.shape[:3], float("-inf"))
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.to(dtype)[None, :, None])
    base = lse.masked_fill(lse == float("-inf"), 0.0)
    return _Weights(s, torch.exp(s - base[..., None]), lse, base, k, v, hidden)


def gather_prefix(prefix: PrefixKV, task_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's own copy of its prefix, padded to the longest: ``[B, kv_heads, M, D]`` x 2, and lengths ``[B]``."""
    index, m = _slots(prefix, task_ids)
    return prefix.k[:, index].transpose(0, 1), prefix.v[:, index].transpose(0, 1), m


def _scatter_prefix(call: AttentionCall, grads: Tensor) -> Tensor:
    """`gather_prefix` backwards: ``[B, kv_heads, M, D]`` summed into ``[kv_heads, tokens, D]``."""
    index, _ = _slots(call.prefix, call.task_ids)
    total = grads.new_zeros(call.prefix.k.shape)
    return total.index_add_(1, index.flatten(), grads.transpose(0, 1).flatten(1, 2))


def _slots(prefix: PrefixKV, task_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of each row's prefix in the bank, ``[B, M]``, any beyond its length; and the lengths ``[B]``."""
    if prefix.num_tasks == 0:
        return task_ids.new_empty((len(task_ids), 0)), torch.zeros_like(task_ids)
    has_task = task_ids >= 0
    task = task_ids.clamp(min=0).long()
    m = torch.where(has_task, prefix.lens[task], 0)
    slots = torch.arange(int(m.max()) if len(m) else 0, device=m.device)
    return torch.where(slots < m[:, None], prefix.starts[task][:, None] + slots, 0).long(), m


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


def query_slots(call: AttentionCall) -> Tensor:
    """Where the relative bias counts each query, among the row's own slots: ``[B, Q, 1]``."""
    i = torch.arange(call.q_len, device=call.q.device)[:, None]
    if call.kv_len is None or not call.causal:
        return (i + (call.kv_capacity - call.q_len)).expand(call.batch, -1, -1)
    return call.kv_len[:, None, None] - call.q_len + i


def relative_scores(call: AttentionCall, prefix_slots: int, m: Tensor) -> Tensor:
    """What the relative bias adds to each score, ``[B, H, Q, M + N]``. m: ``[B]`` prefix lengths."""
    assert call.relative_bias is not None
    return call.relative_bias[:, _distances(call, prefix_slots, m)].transpose(0, 1)


def _scatter_bias(call: AttentionCall, grads: Tensor) -> Tensor:
    """`relative_scores` backwards: ``[B, H, Q, M + N]`` summed into ``[H, 2R + 1]``."""
    assert call.relative_bias is not None
    _, _, m = gather_prefix(call.prefix, call.task_ids)
    index = _distances(call, grads.shape[3] - call.kv_capacity, m)
    total = grads.new_zeros(call.relative_bias.shape)
    return total.index_add_(1, index.flatten(), grads.transpose(0, 1).flatten(1))


def _distances(call: AttentionCall, prefix_slots: int, m: Tensor) -> Tensor:
    """The entry of the relative bias for each query and each of ``[prefix slots ; own slots]``; ``[B, Q, M + N]``."""
    assert call.relative_bias is not None
    reach, query = call.relative_bias.shape[1] // 2, query_slots(call)
    slot = torch.arange(prefix_slots, device=m.device) - m[:, None, None]
    key = torch.arange(call.kv_capacity, device=m.device).expand(call.batch, 1, -1)
    return (torch.cat([slot, key], dim=2) - query).clamp(-reach, reach) + reach
