"""Captured once, replayed with other tasks, lengths and prefixes: what a CUDA graph reads, it reads at each replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import prefix_attn as pa
from prefix_attn.checks import checked_call
from prefix_attn.plan import BatchPlan
from prefix_attn.regime import choose
from tests.cases import Case, make
from tests.hf.conftest import padded_inputs
from tests.hf.families import random_prefix, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: CUDA graphs are not tested")


def captured(function: Callable[[], Tensor], state: list[Tensor]) -> Callable[[], Tensor]:
    """``function`` as a CUDA graph whose replays return one and the same tensor; ``state`` is left as it was."""
    before = [x.clone() for x in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    for x, old in zip(state, before, strict=True):
        x.copy_(old)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


#: One call in each regime: sizes alone choose it.
CALLS = {
    "inline": Case("inline", prefix_lens=(7, 0, 20), kv_len=300, ends=(4, 300, 170, 1)),
    "grouped": Case("grouped", prefix_lens=(8000, 3000), task_ids=tuple(i % 2 for i in range(32)), q_heads=8,
                    kv_len=64, starts=(0,) * 32, ends=(64,) * 32, head_dim=128),
    "prefill": Case("prefill", q_len=70, kv_len=75, starts=(0, 40, 7, 75), ends=(75, 75, 70, 75)),
}  # fmt: skip


@pytest.mark.parametrize("regime", CALLS)
def test_a_call(regime: str) -> None:
    """New task ids, bounds, span tables and numbers in the same tensors."""
    case = CALLS[regime]
    inputs = make(case, torch.bfloat16, DEVICE)
    prefix, ids = inputs.prefix, inputs.task_ids
    bounds = [inputs.options[name] for name in ("kv_start", "kv_len") if inputs.options[name] is not None]

    def call() -> Tensor:
        plan = BatchPlan(ids, prefix.lens)
        assert choose(checked_call(*inputs.args, **inputs.options, plan=plan)).name == regime
        out = pa.prefix_attention(*inputs.args, **inputs.options, plan=plan, backend="triton")
        assert isinstance(out, Tensor)
        return out

    replay = captured(call, [])
    for seed in range(3):
        fresh = make(case, torch.bfloat16, DEVICE, seed=seed)
        news = (fresh.q, fresh.k, fresh.v, fresh.prefix.k, fresh.prefix.v)
        for old, new in zip((inputs.q, inputs.k, inputs.v, prefix.k, prefix.v), news, strict=True):
            old.copy_(new)
        shift = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        for x in (ids, *bounds):
            x.copy_(x[shift])
        if seed == 2:
            prefix.lens[0] -= 3
            ids[0] = -1
        assert torch.equal(replay(), call())


@torch.no_grad()
def test_a_decode_step_of_a_patched_model() -> None:
    """One graph for the life of a bank with a reserve."""
    model = tiny_model("llama", hidden_size=64).to(DEVICE)
    bank = pa.PrefixBank.for_model(model, reserve=(8, 256))
    pa.patch(model, bank)
    for seed, (name, m) in enumerate({"five": 5, "nine": 9, "twelve": 12}.items()):
        bank.add(name, random_prefix(model, m, seed))
    cache = StaticCache(config=model.config, max_cache_len=32)
    inputs = {name: x.to(DEVICE) for name, x in padded_inputs().items()}
    static: dict[str, Tensor] = {}
    graph: Callable[[], Tensor] | None = None

    def step() -> Tensor:
        logits: Tensor = model(**static, past_key_values=cache).logits
        return logits

    def decode(tasks: list[str | None], replayed: bool) -> list[Tensor]:
        nonlocal graph
        cache.reset()
        ids, tokens, mask = bank.task_ids(tasks), inputs["input_ids"], inputs["attention_mask"]
        logits = [model(**inputs, past_key_values=cache, task_ids=ids).logits[:, -1:]]
        for _ in range(4):
            tokens = torch.cat([tokens, logits[-1].argmax(-1)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            ready: dict[str, Any] = model.prepare_inputs_for_generation(
                tokens, next_sequence_length=1, past_key_values=cache, attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1)[:, -1:].contiguous(), task_ids=ids,
            )  # fmt: skip
            for name in ("input_ids", "attention_mask", "position_ids", "task_ids"):
                static.setdefault(name, ready[name].clone()).copy_(ready[name])
            if replayed and graph is None:
                graph = captured(
                    step, [x for layer in cache.layers for x in vars(layer).values() if torch.is_tensor(x)]
                )
            logits.append((graph if replayed and graph is not None else step)().clone())
        return logits

    def check(tasks: list[str | None]) -> None:
        for ours, eager in zip(decode(tasks, replayed=True), decode(tasks, replayed=False), strict=True):
            assert torch.equal(ours, eager)

    check(["five", "twelve", None, "nine"])
    check([None, "nine", "nine", "five"])
    bank.remove("nine")
    bank.add("thirty", random_prefix(model, 30, 7))
    check(["thirty", "five", None, "thirty"])
    pa.unpatch(model)
