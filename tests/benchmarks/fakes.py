"""Libraries that are not here, by their documented arguments and results, computed sequence by sequence in float64.

They stand in for flash-attn, PyTorch's varlen attention and FlashInfer, so that what the peers hand to them (sorted
rows, packed heads, page tables, log-sum-exps) is tested without a GPU.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """One sequence: q ``[Q, H, D]``, k and v ``[N, kv_heads, D]``; out ``[Q, H, D]`` and lse ``[H, Q]`` in nats."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,nhd->hqn", q.double(), k) * q.shape[2] ** -0.5
    if causal:
        queries, keys = scores.shape[1:]
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.einsum("hqn,nhd->qhd", scores.softmax(2), v)
    return out.to(q.dtype), scores.logsumexp(2).float()


def sequences(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, most_q: int, most_k: int, causal: bool
) -> tuple[Tensor, Tensor]:
    assert q_ends.dtype == k_ends.dtype == torch.int32
    assert q_ends[-1] == q.shape[0]
    assert k_ends[-1] == k.shape[0]
    assert (most_q, most_k) == (int(q_ends.diff().max()), int(k_ends.diff().max()))
    parts = [
        attend(q[a:b], k[c:d], v[c:d], causal)
        for a, b, c, d in zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    out, lse = sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    cache_seqlens: Tensor | None = None, causal: bool = False, return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    lens = [k_cache.shape[1]] * len(q) if cache_seqlens is None else cache_seqlens.tolist()
    parts = [attend(q[b], k_cache[b, :n], v_cache[b, :n], causal) for b, n in enumerate(lens)]
    out, lse = (torch.stack(x) for x in zip(*parts, strict=True))
    return (out, lse) if return_softmax_lse else out


def flash_attn() -> ModuleType:
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return module


def varlen_attn_by_flag(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: Any = None,
) -> Any:  # fmt: skip
    """As in PyTorch 2.10."""
    assert return_aux.lse
    return sequences(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)


def varlen_attn_by_window(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """As in PyTorch 2.13, with the shape of the log-sum-exps that its documentation says."""
    assert return_aux.lse
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out, lse = sequences(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))
    return out, lse.T


class Level:
    """One paged attention over lists of pages."""

    def __init__(self) -> None:
        self._backend = "auto"

    def plan(self, q_ends: Tensor, begins: Tensor, pages: Tensor, last: Tensor, page: int) -> None:
        assert len(begins) == len(q_ends) == len(last) + 1
        assert int(begins[-1]) == len(pages)
        assert all(x.dtype == torch.int32 for x in (q_ends, begins, pages, last))
        assert 1 <= int(last.min()) <= int(last.max()) <= page
        self.lists = [
            (slice(int(a), int(b)), pages[int(c) : int(d)], (int(d) - int(c) - 1) * page + int(n))
            for a, b, c, d, n in zip(q_ends[:-1], q_ends[1:], begins[:-1], begins[1:], last, strict=True)
        ]

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        parts = []
        for rows, pages, tokens in self.lists:
            k, v = (x[pages.long()].flatten(0, 1)[:tokens] for x in cache)
            parts.append(attend(q[rows], k, v, causal=False))
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


class MultiLevelCascadeAttentionWrapper:
    made = 0

    def __init__(self, num_levels: int, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        assert kv_layout == "NHD"
        MultiLevelCascadeAttentionWrapper.made += 1
        self._batch_prefill_wrappers = [Level() for _ in range(num_levels)]

    def plan(
        self, qo_indptr_arr: list[Tensor], paged_kv_indptr_arr: list[Tensor], paged_kv_indices_arr: list[Tensor],
        paged_kv_last_page_len: list[Tensor], num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int,
        causal: bool = False, q_data_type: Any = "float16",
    ) -> None:  # fmt: skip
        self.shape, self.dtype = (num_qo_heads, head_dim), q_data_type
        arguments = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        for level, *some in zip(self._batch_prefill_wrappers, *arguments, strict=True):
            level.plan(*some, page_size)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert (q.shape[1:], q.dtype) == (self.shape, self.dtype)
        outs, lses = zip(*(level.run(q, paged_kv_cache) for level in self._batch_prefill_wrappers), strict=True)
        weights = torch.stack(lses).softmax(0).transpose(1, 2)[..., None]  # [levels, rows, heads, 1]
        return (torch.stack(outs).float() * weights).sum(0).to(q.dtype)


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str, use_tensor_cores: bool = False, backend: str = "auto"
    ) -> None:
        assert (kv_layout, use_tensor_cores, backend) == ("NHD", True, "fa2")
        self.level = Level()

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, q_data_type: Any = "float16",
    ) -> None:  # fmt: skip
        self.level.plan(torch.arange(len(indptr), dtype=torch.int32), indptr, indices, last_page_len, page_size)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self.level.run(q, paged_kv_cache)[0]


def flashinfer(cache: Path) -> dict[str, Any]:
    """Modules by name; compiled kernels would lie in ``cache``."""
    module: Any = ModuleType("flashinfer")
    module.MultiLevelCascadeAttentionWrapper = MultiLevelCascadeAttentionWrapper
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    return {"flashinfer": module, "flashinfer.jit.env": SimpleNamespace(FLASHINFER_WORKSPACE_DIR=cache)}
