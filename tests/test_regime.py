"""Which regime is taken, from shapes alone: everything here is on the meta device, which has no values to read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import prefix_attn as pa
from prefix_attn.plan import BatchPlan
from prefix_attn.regime import choose
from prefix_attn.types import AttentionCall, PrefixKV
from tests.cases import Case, make


def call(
    batch: int, tasks: int, m: int, q_len: int = 1, planned: bool = True, own: int = 64, **options: Any
) -> AttentionCall:
    """A decode step of a Llama-3 layer in bfloat16, with ``tasks`` prefixes of ``m`` tokens in the bank."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, 128, dtype=torch.bfloat16, device="meta")

    ids, lens = (torch.empty(n, dtype=torch.int32, device="meta") for n in (batch, tasks))
    prefix = PrefixKV(empty(8, tasks * m), empty(8, tasks * m), lens, lens, options.pop("max_len", m))
    defaults: dict[str, Any] = dict.fromkeys(("kv_start", "kv_len", "window", "softcap", "sinks", "relative_bias"))
    defaults |= {"causal": True, "scale": 0.1, "return_lse": False, "batch_invariant": False}
    return AttentionCall(
        q=empty(batch, 32, q_len), k=empty(batch, 8, own), v=empty(batch, 8, own), prefix=prefix, task_ids=ids,
        plan=BatchPlan(ids, lens) if planned else None, **(defaults | options),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "tasks", "m", "name"),
    [
        (1, 1, 32768, "inline"),  # nobody to share with
        (16, 1, 32, "inline"),
        (64, 8, 32, "inline"),  # prefix tuning's own lengths
        (16, 1, 128, "inline"),
        (64, 8, 0, "inline"),
        (16, 1, 1024, "grouped"),
        (64, 8, 1024, "grouped"),
        (64, 1, 8192, "grouped"),
        (256, 8, 8192, "grouped"),
        (64, 64, 1024, "inline"),  # perhaps one row a task
        (64, 64, 8192, "grouped"),  # perhaps too, but it would hardly show
    ],
)
def test_decode(batch: int, tasks: int, m: int, name: str) -> None:
    assert choose(call(batch, tasks, m)).name == name


@pytest.mark.parametrize(
    ("distinct", "m", "name"),
    [(4, 1024, "grouped"), (64, 1024, "inline"), (64, 8192, "inline"), (0, 8192, "inline"), (None, 1024, "inline")],
)
def test_a_plan_that_knows_how_many_tasks_share_the_batch(distinct: int | None, m: int, name: str) -> None:
    """64 rows, and a bank of 100 tasks."""
    plain = call(64, 100, m)
    assert plain.plan is not None
    known = replace(plain, plan=replace(plain.plan, distinct=distinct))
    assert choose(known).name == name
    eager = torch.compile(lambda: choose(known).name, backend="eager", fullgraph=True)
    assert eager() == choose(plain).name  # what is compiled does not depend on it


def test_many_queries_are_a_prefill() -> None:
    assert choose(call(64, 1, 8192, q_len=17)).name == "prefill"
    assert choose(call(64, 1, 8192, q_len=16)).name == "grouped"


def test_a_relative_bias_is_grouped_like_any_call() -> None:
    table = torch.empty(32, 257, device="meta")
    assert choose(call(64, 8, 1024, relative_bias=table)).name == "grouped"
    assert choose(call(64, 8, 32, relative_bias=table)).name == "inline"


def test_batch_invariant_stays_inline() -> None:
    assert choose(call(64, 1, 8192, batch_invariant=True)).name == "inline"


@pytest.mark.parametrize(
    ("m", "own", "name"), [(256, 512, "inline"), (256, 64, "grouped"), (1024, 512, "grouped"), (1024, 4096, "inline")]
)
def test_a_prefix_hides_behind_own_keys(m: int, own: int, name: str) -> None:
    assert choose(call(64, 1, m, own=own)).name == name


def test_a_window_bounds_what_can_be_saved() -> None:
    assert choose(call(64, 8, 8192, window=32)).name == "inline"


def test_a_plan_for_one_call_must_pay() -> None:
    assert choose(call(16, 1, 1024, planned=False)).name == "inline"
    assert choose(call(16, 1, 1024)).name == "grouped"
    assert choose(call(64, 8, 1024, planned=False)).name == "inline"
    assert choose(call(64, 8, 4096, planned=False)).name == "grouped"


def test_lengths_the_host_does_not_know_are_taken_from_shapes() -> None:
    assert choose(call(64, 8, 8192, max_len=None)).name == "grouped"


def test_explain_says_the_regime_and_what_sharing_saves() -> None:
    inputs = make(Case("explain", prefix_lens=(20,), task_ids=(0,) * 8, kv_len=10))
    plain = pa.explain(*inputs.args)
    assert plain.regime is None
    assert plain.saving == pytest.approx((8 * (20 + 10) * 2 * 2 + 64) / ((20 + 80) * 2 * 2 + 64))
    assert "regime" not in str(plain)
    pytest.importorskip("triton")
    fused = pa.explain(*inputs.args, backend="triton")
    assert fused.regime is not None
    assert fused.regime.name == "inline"
    assert "regime    inline (8 rows" in str(fused)
    assert "against a replicated prefix" in str(fused)
