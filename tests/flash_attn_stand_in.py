"""flash-attn's two functions as its documentation describes them, in PyTorch: for machines where it cannot run.

As in the package, q is ``[batch, tokens, heads, D]``, and a query without keys has a log-sum-exp without meaning.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, cache_leftpad: Tensor, softmax_scale: float,
    causal: bool, softcap: float, return_softmax_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys ``leftpad .. seqlens`` of each row; causal at the bottom right."""
    assert return_softmax_lse
    assert cache_seqlens.dtype == cache_leftpad.dtype == torch.int32
    rows = []
    for b, (start, end) in enumerate(zip(cache_leftpad.tolist(), cache_seqlens.tolist(), strict=True)):
        assert 0 <= start <= end <= k_cache.shape[1]
        rows.append(_attend(q[b], k_cache[b, start:end], v_cache[b, start:end], softmax_scale, causal, softcap))
    outs, lses = zip(*rows, strict=True)
    return torch.stack(outs), torch.stack(lses)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float, causal: bool, softcap: float, return_attn_probs: bool,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """Sequences without gaps: out ``[tokens, heads, D]``, lse ``[heads, tokens]``."""
    assert return_attn_probs
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert (ends_q[0], ends_k[0], ends_q[-1], ends_k[-1]) == (0, 0, len(q), len(k))
    assert max_seqlen_q == max(b - a for a, b in pairwise(ends_q))
    assert max_seqlen_k == max(b - a for a, b in pairwise(ends_k))
    parts = [
        _attend(q[ends_q[i] : ends_q[i + 1]], k[ends_k[i] : ends_k[i + 1]], v[ends_k[i] : ends_k[i + 1]],
                softmax_scale, causal, softcap)
        for i in range(len(ends_q) - 1)
    ]  # fmt: skip
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses, dim=1), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, softcap: float) -> tuple[Tensor, Tensor]:
    """One sequence: q ``[Q, H, D]``, k and v ``[N, kv_heads, D]``; out in q's dtype, lse float32 ``[H, Q]``."""
    group, (queries, keys) = q.shape[1] // k.shape[1], (len(q), len(k))
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    s = scale * torch.einsum("qhd,nhd->hqn", q.float(), k)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    if causal:
        s = s.masked_fill(~torch.ones_like(s, dtype=torch.bool).tril(keys - queries), float("-inf"))
    lse = s.logsumexp(2) if keys else s.new_full(s.shape[:2], float("-inf"))
    blind = lse == float("-inf")
    out = torch.einsum("hqn,nhd->qhd", torch.exp(s - lse.masked_fill(blind, 0.0)[..., None]), v)
    return out.to(q.dtype), lse.masked_fill(blind, float("inf"))
