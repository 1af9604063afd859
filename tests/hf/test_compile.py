"""A patched model under torch.compile: no graph break, as many graphs as unpatched, none added when tasks change."""

from __future__ import annotations

import shutil
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

import prefix_attn as pa
from prefix_attn import dispatch
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import tiny_model
from tests.hf.shrink import tiny_random_model

#: Head dims the kernels take; the tiny models' 8 is too small for them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16}, "gemma3_text": {}, "gpt2": {"n_head": 2}, "gpt_oss": {},
}  # fmt: skip

OTHER_TASKS = [None, "nine", "nine", "five"]


def decode(model: Any, step: Any, **options: Any) -> list[torch.Tensor]:
    """Logits of two single-token steps after an eager prefill, as transformers' generate runs them."""
    inputs = padded_inputs()
    cache = StaticCache(config=model.config, max_cache_len=32)
    logits, tokens, mask = [], inputs["input_ids"], inputs["attention_mask"]
    out = model(**inputs, past_key_values=cache, **options)
    for _ in range(2):
        tokens = torch.cat([tokens, out.logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        ready = model.prepare_inputs_for_generation(
            tokens, next_sequence_length=1, past_key_values=cache, attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, -1:].contiguous(), **options,
        )  # fmt: skip
        out = step(**ready)
        logits.append(out.logits.clone())
    return logits


def compiled(model: Any, compiler: str) -> tuple[Any, CompileCounterWithBackend]:
    """The model compiled as a whole, and the counter of its graphs."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(model, backend=counter, fullgraph=True), counter


@cache
def unpatched_graphs(family: str) -> int:
    model = tiny_model(family, **FAMILIES[family])
    step, counter = compiled(model, "eager")
    with torch.no_grad():
        decode(model, step)
    return counter.frame_count


def check(family: str, compiler: str) -> None:
    expected_graphs = unpatched_graphs(family)
    model = tiny_model(family, **FAMILIES[family])
    bank = make_bank(model)
    pa.patch(model, bank)
    step, counter = compiled(model, compiler)
    with torch.no_grad():
        for tasks in (TASKS, OTHER_TASKS):
            ids = bank.task_ids(tasks)
            for ours, eager in zip(decode(model, step, task_ids=ids), decode(model, model, task_ids=ids), strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == expected_graphs


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_as_one_graph(family: str) -> None:
    check(family, "aot_eager")


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler: inductor cannot compile for this CPU"
)
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_compiled_by_inductor(family: str) -> None:
    check(family, "inductor")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_decode_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's path, its kernels interpreted here: regimes and plans are chosen in front of the operator."""
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda call, backend: choose(call, "triton"))
    check("llama", "aot_eager")


@pytest.mark.parametrize("family", ["llama", "bart", "nemotron"])
def test_graph_breaks_keep_what_a_pass_knows(family: str) -> None:
    """Its keywords, its positions in a table, and a batch in the thread's scope; a pass before had other tasks."""
    model = tiny_random_model(family)
    pa.patch(model, make_bank(model))
    inputs = padded_inputs()
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    layer.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    torch.compiler.reset()
    step = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(**inputs, task_ids=TASKS, use_cache=False).logits
        for others in ([None, "nine", "nine", "five"], None):
            model(**inputs, task_ids=others, use_cache=False)
            for _ in range(2):
                found = step(**inputs, task_ids=TASKS, use_cache=False).logits
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pass_without_a_mask(family: str) -> None:
    """transformers then looks for packed rows, by positions that a compiler does not see."""
    model = tiny_random_model(family)
    pa.patch(model, make_bank(model))
    ids = padded_inputs()["input_ids"]
    torch.compiler.reset()
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(input_ids=ids, task_ids=TASKS, use_cache=False).logits
        torch.testing.assert_close(step(input_ids=ids, task_ids=TASKS, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bank_with_a_reserve_takes_tasks_without_a_new_graph(family: str) -> None:
    model = tiny_random_model(family)
    bank = pa.PrefixBank.for_model(model, reserve=(20, 400))
    bank.add("first", bank_values(bank, 5))
    pa.patch(model, bank)
    step, counter = compiled(model, "eager")
    inputs = padded_inputs()
    for count in range(12):  # more than torch compiles of one function
        ids = bank.task_ids([bank.names[-1], None, "first", "first"])
        with torch.no_grad():
            expected = model(**inputs, task_ids=ids, use_cache=False).logits
            torch.testing.assert_close(step(**inputs, task_ids=ids, use_cache=False).logits, expected)
        bank.add(f"task {count}", bank_values(bank, 7, seed=count))
    assert counter.frame_count == 1


def bank_values(bank: pa.PrefixBank, tokens: int, seed: int = 0) -> Any:
    """Random values of a task, for the decoder."""
    rng = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(layer.kv_heads, tokens, dim, generator=rng) for dim in (layer.head_dim, layer.v_head_dim))
        for layer in bank.geometry.layers
    ]
