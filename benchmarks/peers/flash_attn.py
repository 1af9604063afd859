"""Shared prefixes with flash attention as it is: once over the prefixes, once over the rows' own keys, then a merge.

Rows are sorted by task, so that the rows of a task are one sequence of queries over its prefix. In decode the query
heads of a kv head are packed into that sequence, so that each key is read once for all of them. How queries and keys
lie is prepared, untimed, as each function likes it; both passes and the merge (one Triton launch) are timed.

- `TorchVarlen`: `torch.nn.attention.varlen`, PyTorch's own flash attention 2.
- `FlashAttnVarlen`, `FlashAttnKvcache`: the packages flash_attn (2) and flash_attn_interface (3); the latter function
  also splits the keys of a row, but takes tasks of equally many rows only, and only decode.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .by_task import Sorted, SortedRows, boundaries
from .problem import Point, Problem


@dataclass(frozen=True, eq=False)
class Sequences:
    """Queries and keys of several sequences, one after the other.

    q: ``[queries, heads, head_dim]``; k, v: ``[keys, kv_heads, head_dim]``; q_ends, k_ends: int32 ``[sequences + 1]``,
    where each begins and the last ends; most_q, most_k: the longest.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_ends: Tensor
    k_ends: Tensor
    most_q: int
    most_k: int
    causal: bool


class Varlen(SortedRows):
    """Both passes by one function that takes sequences of any lengths."""

    @abstractmethod
    def attend(self, x: Sequences) -> tuple[Tensor, Tensor]:
        """``(out [queries, heads, head_dim], lse float32 [heads, queries] in nats)``."""

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        from .merge_kernel import merge_two

        point, by_task, device = problem.point, Sorted.of(problem), problem.q.device
        q, own_k, own_v = (x[by_task.order] for x in (problem.q, problem.k, problem.v))
        if point.q_len == 1:
            q = q.view(point.batch, point.kv_heads, point.group, -1)
        q = q.transpose(1, 2).contiguous()  # [B, queries of a row, heads, D]
        batch, per_row, heads, head_dim = q.shape
        q, own_k, own_v = q.flatten(0, 1), tokens_first(own_k), tokens_first(own_v)
        prefix_k, prefix_v = (
            torch.cat([x[:, start : start + m] for start, m in problem.prefix.spans], dim=1)
            .transpose(0, 1)
            .contiguous()
            for x in (problem.prefix.k, problem.prefix.v)
        )
        queries = [per_row * rows for rows in by_task.rows]
        on_prefix = Sequences(
            q, prefix_k, prefix_v, boundaries(queries, device), boundaries(by_task.lens, device), max(queries),
            max(by_task.lens), causal=False,
        )  # fmt: skip
        on_own = Sequences(
            q, own_k, own_v, boundaries([per_row] * batch, device), boundaries([point.n] * batch, device), per_row,
            point.n, causal=point.q_len > 1,
        )  # fmt: skip

        def call() -> Tensor:
            parts = []
            for out, lse in (self.attend(on_prefix), self.attend(on_own)):
                parts += [out.view(batch, per_row, heads, 1, head_dim), log_sum_exps(lse, heads, batch, per_row)]
            return merge_two(*parts).view(batch, per_row, heads, head_dim).transpose(1, 2)

        return call


class TorchVarlen(Varlen):
    """PyTorch's flash attention for sequences of any lengths; its signature differs by version."""

    name = "torch varlen, merged"
    version = f"torch {torch.__version__}"

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"PyTorch has it on GPUs only, not on {device.type!r}"
        try:
            module = import_module("torch.nn.attention.varlen")
        except ImportError as e:
            return f"this PyTorch does not have it ({e})"
        return None if hasattr(module, "AuxRequest") else "this PyTorch's gives no log-sum-exps"

    def attend(self, x: Sequences) -> tuple[Tensor, Tensor]:
        module = import_module("torch.nn.attention.varlen")
        options: dict[str, Any] = {"return_aux": module.AuxRequest(lse=True)}
        known = inspect.signature(module.varlen_attn).parameters
        if "window_size" in known:
            options["window_size"] = (-1, 0) if x.causal else (-1, -1)
        else:
            options["is_causal"] = x.causal
        if "enable_gqa" in known:
            options["enable_gqa"] = x.q.shape[1] != x.k.shape[1]
        out, lse = module.varlen_attn(x.q, x.k, x.v, x.q_ends, x.k_ends, x.most_q, x.most_k, **options)
        return out, lse


class FlashAttn(SortedRows):
    """What both functions of a flash-attn package have in common: whether it is there."""

    function: str

    def __init__(self, package: str = "flash_attn") -> None:
        self.package = package
        self.name = f"{package} {self.function}, merged"
        try:
            self.version = f"{package} {version(package)}"
        except PackageNotFoundError:
            self.version = package

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it runs on GPUs only, not on {device.type!r}"
        try:
            self.find()
        except Exception as e:  # a compiled extension that does not fit this PyTorch fails in many ways
            return f"{self.package} cannot be imported ({type(e).__name__}: {str(e).partition(chr(10))[0]})"
        return None

    def find(self) -> Callable[..., Any]:
        names = {"varlen": "flash_attn_varlen_func", "kvcache": "flash_attn_with_kvcache"}
        found: Callable[..., Any] = getattr(import_module(self.package), names[self.function])
        return found


class FlashAttnVarlen(FlashAttn, Varlen):
    """``flash_attn_varlen_func``."""

    function = "varlen"

    def attend(self, x: Sequences) -> tuple[Tensor, Tensor]:
        attend = self.find()
        options = {"return_attn_probs": True} if "return_attn_probs" in inspect.signature(attend).parameters else {}
        return with_lse(
            attend(
                x.q, x.k, x.v, cu_seqlens_q=x.q_ends, cu_seqlens_k=x.k_ends, max_seqlen_q=x.most_q,
                max_seqlen_k=x.most_k, causal=x.causal, **options,
            )
        )  # fmt: skip


class FlashAttnKvcache(FlashAttn):
    """``flash_attn_with_kvcache``: the rows of a task as one row with many queries over a cache that is its prefix."""

    function = "kvcache"

    def unsuited(self, point: Point) -> str | None:
        return None if point.q_len == 1 else "it is a decode function"

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        from .merge_kernel import merge_two

        attend, point, by_task = self.find(), problem.point, Sorted.of(problem)
        tasks, per_task = len(by_task.rows), by_task.rows[0]
        if set(by_task.rows) != {per_task}:
            raise ValueError(f"tasks have {min(by_task.rows)} to {max(by_task.rows)} rows; it takes equally many")
        kv_heads, group, head_dim = point.kv_heads, point.group, point.head_dim
        q, own_k, own_v = (x[by_task.order] for x in (problem.q, problem.k, problem.v))
        own_q = q.transpose(1, 2)  # [B, 1, H, D]
        prefix_q = q.view(tasks, per_task, kv_heads, group, head_dim).transpose(2, 3).flatten(1, 2).contiguous()
        own_k, own_v = (x.transpose(1, 2) for x in (own_k, own_v))  # [B, n, kv_heads, D]
        prefix_k, prefix_v = (  # [T, longest, kv_heads, D]
            pad_sequence(prefixes(x, problem), batch_first=True) for x in (problem.prefix.k, problem.prefix.v)
        )
        lens = torch.tensor(by_task.lens, dtype=torch.int32, device=q.device)
        shape = (tasks, per_task, kv_heads, group)

        def call() -> Tensor:
            own, own_lse = with_lse(attend(own_q, own_k, own_v, return_softmax_lse=True))
            prefix, prefix_lse = with_lse(
                attend(prefix_q, prefix_k, prefix_v, cache_seqlens=lens, return_softmax_lse=True)
            )
            prefix = prefix.view(tasks, per_task, group, kv_heads, head_dim).transpose(2, 3)
            prefix_lse = prefix_lse.view(tasks, kv_heads, per_task, group).transpose(1, 2)
            return merge_two(own.view(*shape, head_dim), own_lse.view(shape), prefix, prefix_lse)

        return call


def prefixes(bank: Tensor, problem: Problem) -> list[Tensor]:
    """The keys or values of each task, ``[m, kv_heads, D]``."""
    return [bank[:, start : start + m].transpose(0, 1) for start, m in problem.prefix.spans]


def tokens_first(x: Tensor) -> Tensor:
    """``[B, heads, tokens, D]`` as ``[B * tokens, heads, D]``."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def log_sum_exps(lse: Tensor, heads: int, batch: int, per_row: int) -> Tensor:
    """``[heads, queries]`` (or, where a version does that, its transpose) as ``[batch, per_row, heads, 1]``."""
    queries = batch * per_row
    if lse.shape == (queries, heads) != (heads, queries):
        lse = lse.T
    if lse.shape != (heads, queries):
        raise ValueError(f"log-sum-exps of shape {list(lse.shape)}, expected {[heads, queries]}")
    return lse.reshape(heads, batch, per_row).permute(1, 2, 0)[..., None]


def with_lse(result: Any) -> tuple[Tensor, Tensor]:
    """The first two of a function's results."""
    if not isinstance(result, tuple | list) or len(result) < 2:
        raise ValueError("this version gives no log-sum-exps")
    return result[0], result[1]
