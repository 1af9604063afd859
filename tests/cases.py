"""The calls every backend must get right, and how their random inputs are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefix_attn.types import PrefixKV


@dataclass(frozen=True)
class Case:
    """One call of `prefix_attention`, by sizes."""

    name: str
    prefix_lens: tuple[int, ...] = (7, 0, 20)
    task_ids: tuple[int, ...] = (0, 2, -1, 2)
    q_heads: int = 4
    kv_heads: int = 2
    q_len: int = 1
    kv_len: int = 13
    head_dim: int = 16
    starts: tuple[int, ...] | None = None
    ends: tuple[int, ...] | None = None
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    strided: bool = False
    apart: bool = False  # the elements of a head do not lie side by side
    reach: int | None = None  # R of a relative bias


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; ``args`` and ``options`` are what `prefix_attention` takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix: PrefixKV
    task_ids: Tensor
    options: dict[str, Any]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.prefix, self.task_ids

    def rows(self, rows: list[int]) -> Inputs:
        """A batch of some of the rows."""
        bounds = {name: x[rows] for name in ("kv_start", "kv_len") if (x := self.options[name]) is not None}
        q, k, v, task_ids = (x[rows] for x in (self.q, self.k, self.v, self.task_ids))
        return Inputs(q, k, v, self.prefix, task_ids, self.options | bounds)

    def requiring_grad(
        self, dtype: torch.dtype = torch.float32, names: Sequence[str] | None = None
    ) -> tuple[Inputs, dict[str, Tensor]]:
        """The same inputs in ``dtype``; those in ``names`` (all of `DIFFERENTIABLE`) as leaves of autograd, which come
        second."""
        tensors = {name: x.detach().to(dtype) for name in DIFFERENTIABLE if (x := self.tensor(name)) is not None}
        leaves = {name: x.requires_grad_() for name, x in tensors.items() if names is None or name in names}
        prefix = replace(self.prefix, k=tensors["prefix.k"], v=tensors["prefix.v"])
        options = self.options | {name: x for name, x in tensors.items() if name in self.options}
        return Inputs(tensors["q"], tensors["k"], tensors["v"], prefix, self.task_ids, options), leaves

    def tensor(self, name: str) -> Tensor | None:
        """One of `DIFFERENTIABLE`."""
        if name in self.options:
            return self.options[name]
        return getattr(self.prefix if name.startswith("prefix.") else self, name.removeprefix("prefix."))


#: Inputs that may have a gradient.
DIFFERENTIABLE = ("q", "k", "v", "prefix.k", "prefix.v", "sinks", "relative_bias")


DECODE = Case("decode")
PREFILL = Case("prefill", q_len=13, kv_len=13)

CASES = [
    DECODE,
    PREFILL,
    Case("no_task_at_all", task_ids=(-1, -1, -1, -1)),
    Case("one_task_for_all", task_ids=(2, 2, 2, 2)),
    Case("one_row", task_ids=(2,)),
    Case("empty_prefix", task_ids=(1, 1, 1, 1)),
    Case("prefix_only", kv_len=0, causal=False),
    Case("nothing_visible", kv_len=0, task_ids=(-1, 1, 0, -1), causal=False),
    Case("one_key", kv_len=1),
    Case("one_token_prefix", prefix_lens=(1, 1, 1)),
    Case("mha", kv_heads=4),
    Case("mqa", q_heads=6, kv_heads=1),
    Case("group_of_three", q_heads=6, kv_heads=2),
    Case("long_prefix", prefix_lens=(5, 150, 333), task_ids=(2, 1, 2, 2), kv_len=33),
    Case("shared_prefix", prefix_lens=(400, 300, 2), task_ids=(0, 1, 0, 1, 0, 1, 2, 0, -1, 1), kv_len=21),
    Case("long_own", kv_len=300),
    Case("few_queries", q_len=3),
    Case("chunked_prefill", q_len=5, kv_len=40),
    Case("left_padding_decode", starts=(0, 3, 12, 13)),
    Case("left_padding_prefill", q_len=13, starts=(0, 3, 12, 13)),
    Case("static_cache_decode", kv_len=30, ends=(4, 30, 17, 1)),
    Case("static_cache_padded", kv_len=30, starts=(1, 5, 0, 17), ends=(4, 30, 17, 17)),
    Case("shorter_than_queries", q_len=6, ends=(2, 13, 6, 0)),
    Case("not_causal", q_len=4, causal=False, starts=(0, 2, 0, 1)),
    Case("window_decode", window=5),
    Case("window_cuts_prefix", window=18),
    Case("window_prefill", window=6, q_len=13, starts=(0, 3, 0, 5)),
    Case("window_of_one", window=1, q_len=4),
    Case("window_wider_than_all", window=4000, q_len=3),
    Case("softcap", softcap=2.0),
    Case("softcap_prefill", softcap=2.0, q_len=13, window=9),
    Case("sinks_decode", sinks=True),
    Case("sinks_prefill", sinks=True, q_len=13, window=4, starts=(0, 3, 0, 5)),
    Case("sinks_nothing_visible", sinks=True, kv_len=0, task_ids=(-1, 1, 0, -1), causal=False),
    Case("scale", scale=0.3, q_len=2),
    Case("negative_scale", scale=-0.3, q_len=13),
    Case("scale_of_zero", scale=0.0, q_len=13, task_ids=(-1, -1)),
    Case("relative_bias_decode", reach=9),
    Case("relative_bias_prefill", reach=9, q_len=13, kv_heads=4, starts=(0, 3, 0, 5)),
    Case("relative_bias_not_causal", reach=40, q_len=13, causal=False, starts=(0, 2, 0, 12)),
    Case(
        "relative_bias_and_all_else",
        reach=3,
        q_len=5,
        window=11,
        softcap=3.0,
        sinks=True,
        kv_len=30,
        starts=(1, 5, 0, 17),
        ends=(6, 30, 17, 21),
    ),
    Case("relative_bias_right_padding", reach=6, q_len=13, causal=False, starts=(0, 0, 2, 0), ends=(13, 4, 9, 0)),
    Case("relative_bias_of_one", reach=0, q_len=2, prefix_lens=(70, 90, 110)),
    Case("strided", strided=True, q_len=3),
    Case("strided_decode", strided=True),
    Case("elements_apart", apart=True, q_len=3),
    Case("elements_apart_decode", apart=True),
    Case("elements_apart_prefill", apart=True, q_len=13, prefix_lens=(7, 0, 70), starts=(0, 3, 12, 13)),
    *(Case(f"head_dim_{d}", head_dim=d, kv_heads=4) for d in (24, 72, 80, 96, 256)),
    Case("prefill_past_a_tile", q_len=70, kv_len=75, prefix_lens=(33, 64, 65), task_ids=(0, 1, 2), starts=(0, 40, 7)),
    Case("many_rows", task_ids=tuple(i % 4 - 1 for i in range(40)), kv_len=5),
]


def make(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs of a case. Scores have a spread of a few units, as a trained model's do."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(device, dtype)

    batch, dim = len(case.task_ids), case.head_dim
    if case.strided:  # [batch, length, heads, head_dim] in memory, keys and values interleaved
        q = randn(batch, case.q_len, case.q_heads, dim).transpose(1, 2)
        k, v = randn(batch, case.kv_len, 2, case.kv_heads, dim).permute(2, 0, 3, 1, 4)
    else:
        q = randn(batch, case.q_heads, case.q_len, dim)
        k, v = randn(batch, case.kv_heads, case.kv_len, dim), randn(batch, case.kv_heads, case.kv_len, dim)
    prefix = PrefixKV.pack([(randn(case.kv_heads, m, dim), randn(case.kv_heads, m, dim)) for m in case.prefix_lens])
    integers = {"dtype": torch.int32, "device": device}
    options: dict[str, Any] = {
        "kv_start": None if case.starts is None else torch.tensor(case.starts, **integers),
        "kv_len": None if case.ends is None else torch.tensor(case.ends, **integers),
        "causal": case.causal, "scale": case.scale, "window": case.window, "softcap": case.softcap,
        "sinks": randn(case.q_heads) if case.sinks else None,
        "relative_bias": None if case.reach is None else randn(case.q_heads, 2 * case.reach + 1),
    }  # fmt: skip
    q = 2 * q
    if case.apart:
        q, k, v, pk, pv = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v, prefix.k, prefix.v))
        prefix = replace(prefix, k=pk, v=pv)
    return Inputs(q, k, v, prefix, torch.tensor(case.task_ids, **integers), options)


def poisoned(inputs: Inputs) -> Inputs:
    """The same call with NaN in everything that must not be read.

    That is: prefixes of tasks no row has, the alignment gaps between prefixes, keys before ``kv_start`` and from
    ``kv_len`` on.
    """
    nan, prefix = float("nan"), inputs.prefix
    unread = torch.ones(prefix.k.shape[1], dtype=torch.bool)
    for task in set(inputs.task_ids.tolist()) - {-1}:
        start, m = prefix.spans[task]
        unread[start : start + m] = False
    pk, pv = prefix.k.clone(), prefix.v.clone()
    pk[:, unread], pv[:, unread] = nan, nan
    k, v = inputs.k.clone(), inputs.v.clone()
    batch, n = k.shape[0], k.shape[2]
    start, end = inputs.options["kv_start"], inputs.options["kv_len"]
    for b in range(batch):
        hidden = torch.ones(n, dtype=torch.bool)
        hidden[(start[b] if start is not None else 0) : (end[b] if end is not None else n)] = False
        k[b, :, hidden], v[b, :, hidden] = nan, nan
    return replace(inputs, k=k, v=v, prefix=replace(prefix, k=pk, v=pv))
