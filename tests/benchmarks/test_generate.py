"""End to end on a model of no size: both providers agree before they are timed; who disagrees carries no time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import prefix_attn as pa
from benchmarks import generate
from benchmarks.generate import PEFT, Comparison, random_prefixes, run_generations
from benchmarks.peers import OURS
from benchmarks.record import Environment, GenerationRow
from benchmarks.suites import Generation, generations
from prefix_attn.backends import cpu

CPU = torch.device("cpu")
POINT = Generation("tiny", rows=6, tasks=2, prefix_tokens=5, prompt_tokens=4, new_tokens=3)
ENVIRONMENT = Environment.read(CPU, "abc")


def tiny(positions: int, device: torch.device) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 50}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 49)
    return GPT2LMHeadModel(GPT2Config(n_positions=positions, **sizes, **ends)).to(device).eval()


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate.MODELS, "tiny", tiny)


def test_both_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(self: Comparison, names: list[str], repeats: int) -> dict[str, Any]:
        for first, whole in measured(self, names, 1).values():
            assert len(first) == len(whole) == 1
            assert min(first + whole) > 0
        return {name: ([1.0, 1.0], [2.0, 3.0]) for name in names}

    measured = Comparison._times
    monkeypatch.setattr(Comparison, "_times", times)
    rows: list[GenerationRow] = []
    left_out = run_generations([POINT, replace(POINT, tasks=3)], CPU, ENVIRONMENT, 60, rows.extend)
    assert left_out == []
    assert [(row.provider, row.tasks, row.status) for row in rows] == [
        (OURS, 2, "ok"), (PEFT, 2, "ok"), (OURS, 3, "ok"), (PEFT, 3, "ok"),
    ]  # fmt: skip
    copy = 2 * 2 * 32 * 5 * 4  # layers, keys and values, hidden size, tokens, bytes
    ours, theirs = rows[:2]
    assert (ours.prefix_bytes, ours.prefix_bytes_at_once) == (2 * copy, 2 * copy)
    assert (theirs.prefix_bytes, theirs.prefix_bytes_at_once) == ((2 + 6) * copy, (2 + 3) * copy)
    for row in rows:
        assert row.decode_tokens_per_s == pytest.approx((6 * 2 / 1 + 6 * 2 / 2) / 2)  # new tokens after the first
        assert row.first_token_s == 1.0
        assert row.prefill_tokens_per_s == 6 * 4
        assert row.peak_bytes is not None
        assert row.prefix_bytes_at_once is not None
        assert row.peak_bytes > row.prefix_bytes_at_once


def test_a_busy_machine_gives_no_time() -> None:
    comparison = Comparison(tiny(20, CPU), POINT, ENVIRONMENT)
    row = comparison._timed(comparison.template, [1.0, 1.0], [2.0, 0.9])
    assert row.status.startswith("no time: ")
    assert row.decode_tokens_per_s is None
    assert not row.failed


def test_without_time_points_are_named() -> None:
    assert run_generations([POINT], CPU, ENVIRONMENT, 0, pytest.fail) == [
        f"generate left out for want of time: {POINT}"
    ]


def test_a_broken_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.forward

    def broken(call: Any) -> Any:
        out, lse = right(call)
        return out + (call.batch > 1), lse  # what `patch` tries has one row

    monkeypatch.setattr(cpu, "forward", broken)
    rows: list[GenerationRow] = []
    run_generations([POINT], CPU, ENVIRONMENT, 60, rows.extend)
    assert [row.failed for row in rows] == [True, True]
    for row in rows:
        assert row.status.startswith("wrong: first logits differ by ")
        assert row.decode_tokens_per_s is None


def test_the_slow_way_is_not_timed_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda call: (right(call)[0] + 1, None))
    rows: list[GenerationRow] = []
    run_generations([POINT], CPU, ENVIRONMENT, 60, rows.extend)
    assert rows[0].status.startswith("refused: SlowModel: ")
    assert rows[0].decode_tokens_per_s is None


def test_what_a_provider_raises_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Comparison, new: int) -> Any:
        raise ValueError("not with this cache\nand more")

    monkeypatch.setattr(Comparison, "grouped", refuse)
    rows: list[GenerationRow] = []
    run_generations([POINT], CPU, ENVIRONMENT, 60, rows.extend)
    assert [row.failed for row in rows] == [False, False]
    assert rows[1].status == "refused: ValueError: not with this cache"


def test_prefixes_fit_grouped_heads() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=9))
    prefixes = random_prefixes(pa.PrefixBank.for_model(model), tasks=2, m=5, rng=torch.Generator())
    assert [x.shape for x in prefixes.values()] == [(3, 2, 2, 5, 16)] * 2


def test_grids_show_memory_over_rows_and_tasks() -> None:
    for on_gpu in (True, False):
        points = generations(on_gpu, quick=False)
        assert len(points) == len(set(points))
        m, tasks = (1024, 4) if on_gpu else (100, 4)
        assert len({p.rows for p in points if (p.prefix_tokens, p.tasks, p.cache) == (m, tasks, "dynamic")}) >= 2
        assert len({p.tasks for p in points if (p.prefix_tokens, p.rows, p.cache) == (m, 16, "dynamic")}) >= 3
        assert len(generations(on_gpu, quick=True)) < len(points)
