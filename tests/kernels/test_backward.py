"""Gradients of the kernels against autograd of the formula in float64; nothing unread leaks, bits repeat."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prefix_attn.backends import reference
from prefix_attn.checks import checked_call
from prefix_attn.kernels.backward import attention_backward, saved_rows
from prefix_attn.kernels.backward_dkv import bank_gradients, bank_tiles, own_key_gradients
from prefix_attn.kernels.backward_dq import query_gradient
from prefix_attn.regime import use_decode
from prefix_attn.types import AttentionCall
from tests.cases import CASES, DIFFERENTIABLE, Case, Inputs, make, poisoned
from tests.kernels.calls import DEVICE, TILE, launch, with_tasks
from tests.tolerance import GRADIENT, assert_close

EDGES = Case("edges", prefix_lens=(5, 33, 16), task_ids=(1, 0, 1), q_heads=2, kv_heads=1, q_len=18, kv_len=35,
             starts=(0, 3, 17), ends=(35, 20, 35))  # fmt: skip
NAMES = ("prefix_only", "sinks_nothing_visible", "static_cache_padded", "strided", "shorter_than_queries",
         "window_cuts_prefix", "relative_bias_prefill", "relative_bias_and_all_else", "relative_bias_of_one",
         "relative_bias_right_padding")  # fmt: skip
OPTIONS = (
    {}, {"window": 9}, {"window": 40, "softcap": 3.0, "sinks": True}, {"window": 20, "causal": False},
    {"scale": -0.4, "q_len": 5}, {"scale": 0.0, "q_len": 2}, {"scale": -0.4, "softcap": 2.0, "q_len": 2},
    {"prefix_lens": (0, 0), "q_len": 3}, {"head_dim": 24, "q_heads": 3, "q_len": 6},
    {"reach": 12}, {"reach": 50, "window": 30, "causal": False}, {"reach": 7, "scale": -0.4, "q_len": 5},
    {"reach": 7, "scale": 0.0, "q_len": 2}, {"reach": 7, "scale": -0.4, "softcap": 2.0, "q_len": 2},
)  # fmt: skip


def cotangents(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Of out, in q's dtype, and of lse."""
    rng = torch.Generator().manual_seed(1)
    shape = inputs.q.shape
    return torch.randn(shape, generator=rng).to(DEVICE, inputs.q.dtype), torch.randn(shape[:3], generator=rng).to(
        DEVICE
    )


def autograd(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of the formula, everything in ``dtype``."""
    do, dlse = cotangents(inputs)
    inputs, leaves = inputs.requiring_grad(dtype, DIFFERENTIABLE[:-1])  # of a relative bias there is none
    out, lse = reference.attend(checked_call(*inputs.args, **inputs.options), dtype)
    seen = ~lse.isinf()
    loss = (out * do.to(dtype)).sum() + (lse[seen] * dlse[seen].to(dtype)).sum()
    return list(torch.autograd.grad(loss, list(leaves.values())))


def backward(call: AttentionCall, out: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None) -> list[Tensor]:
    """Gradients of the kernels, with tiles small enough that every edge is an edge of one, and sums in two parts."""
    rows = saved_rows(call, out, lse, do, dlse)
    grads = [query_gradient(call, *rows, TILE), *own_key_gradients(call, *rows, TILE)]
    grads += bank_gradients(call, *rows, TILE, parts=2)
    *others, sinks = attention_backward(call, out, lse, do, dlse, [False] * 5 + [True])
    assert all(x is None for x in others)
    return grads if sinks is None else [*grads, sinks]


def gradients(inputs: Inputs) -> list[Tensor]:
    """`backward` after the forward kernel that the call would go to."""
    call = checked_call(*inputs.args, **inputs.options)
    out, lse = launch(call, "decode" if use_decode(call.q_len, call.group) else "prefill")
    return backward(call, out, lse, *cotangents(inputs))


def check(case: Case, dtype: torch.dtype = torch.float32, hidden: int = 0) -> None:
    """hidden: entries of a relative bias, those of the farthest keys, that hide them."""
    batches = [make(case, dtype, DEVICE, seed) for seed in range(3)]  # a largest error over few numbers is noise
    for inputs in batches if hidden else ():
        inputs.options["relative_bias"][:, :hidden] = float("-inf")
    runs = (
        [gradients(x) for x in batches], [autograd(x, dtype) for x in batches],
        [autograd(x, torch.float64) for x in batches],
    )  # fmt: skip
    assert len({len(run[0]) for run in runs}) == 1
    for i, name in enumerate(DIFFERENTIABLE[: len(runs[0][0])]):
        x, eager, exact = (torch.stack([grads[i] for grads in run]) for run in runs)
        assert x.dtype == dtype
        assert_close(f"gradient of {name}", x, eager, exact, GRADIENT)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=lambda c: c.name)
def test_equals_autograd_of_the_formula(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_around_tile_edges(options: dict[str, object]) -> None:
    check(replace(EDGES, **options))


def test_a_bias_may_hide_keys() -> None:
    check(Case("bias", q_len=9, kv_len=40, prefix_lens=(70, 0, 100), reach=20), hidden=11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    check(replace(EDGES, window=30), dtype)


@pytest.mark.parametrize("window", [None, 24])
def test_unread_nan_stays_unread_and_bits_repeat(window: int | None) -> None:
    inputs = make(replace(EDGES, task_ids=(1, -1, 1), window=window), device=DEVICE)
    clean, dirty = gradients(inputs), gradients(poisoned(inputs))
    for x, y in zip(clean, dirty, strict=True):
        assert not x.isnan().any()
        assert torch.equal(x, y)
    for b, (start, end) in enumerate(zip(inputs.options["kv_start"], inputs.options["kv_len"], strict=True)):
        for grad in clean[1:3]:
            assert not grad[b, :, :start].any()
            assert not grad[b, :, end:].any()
    used = slice(16, 16 + 33)  # of task 1
    for grad in clean[3:]:
        assert grad[:, used].any()
        grad[:, used] = 0
        assert not grad.any()


@pytest.mark.parametrize(
    ("fault", "value"), [("task", 77), ("kv_len", -1), ("kv_len", 999), ("kv_start", -1), ("kv_start", 999)]
)
def test_a_row_in_error_has_no_gradient_and_spoils_none(fault: str, value: int) -> None:
    """Its out is NaN, and so is what comes back."""
    inputs = make(EDGES, device=DEVICE)
    call = checked_call(*inputs.args, **inputs.options)
    bad, without = with_tasks(call, [1, 77, 1]), with_tasks(call, [1, -1, 1])
    if fault != "task":
        values = getattr(call, fault).clone()
        values[1] = value
        bad = replace(call, **{fault: values})
    do, dlse = cotangents(inputs)
    expected = backward(without, *launch(without, "prefill"), do, dlse)
    do[1], dlse[1] = float("nan"), float("nan")
    out, lse = launch(bad, "prefill")
    assert out[1].isnan().all()
    found = backward(bad, out, lse, do, dlse)
    for x, y in zip(found[:3], expected[:3], strict=True):
        assert not x[1].any()
        assert torch.equal(x[[0, 2]], y[[0, 2]])
    for x, y in zip(found[3:], expected[3:], strict=True):
        assert torch.equal(x, y)


def test_a_broadcast_cotangent_and_no_lse() -> None:
    """What ``out.sum()`` sends back has stride 0 everywhere."""
    inputs = make(EDGES, device=DEVICE)
    call = checked_call(*inputs.args, **inputs.options)
    out, lse = launch(call, "prefill")
    ones = torch.ones((), device=DEVICE).expand(out.shape)
    for x, y in zip(backward(call, out, lse, ones, None), backward(call, out, lse, ones.clone(), 0 * lse), strict=True):
        assert torch.equal(x, y)


def test_tiles_of_the_bank() -> None:
    """Each tile of each prefix that a row reads, once; and the rows of each task, in order."""
    for seed in range(40):
        check_tiles(seed)


def check_tiles(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    lens = torch.randint(-1, 70, (4,), generator=rng).tolist()
    inputs = make(replace(EDGES, prefix_lens=tuple(max(m, 0) for m in lens), starts=None, ends=None), device=DEVICE)
    call = checked_call(*inputs.args, **inputs.options)
    ids = torch.randint(-2, 6, (3,), generator=rng).tolist()
    tables = bank_tiles(with_tasks(call, ids, torch.tensor(lens, dtype=torch.int32, device=DEVICE)), 32)
    order, first, readers, tasks, slots = (x.tolist() for x in tables)
    found = [(task, slot) for task, slot in zip(tasks, slots, strict=True) if task >= 0]
    assert found == [(t, j) for t, m in enumerate(lens) if t in ids for j in range(0, m, 32)]
    for t in range(4):
        assert order[first[t] : first[t] + readers[t]] == [b for b, task in enumerate(ids) if task == t]
