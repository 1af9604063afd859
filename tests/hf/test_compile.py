"""A patched model under torch.compile: no graph break, as many graphs as unpatched, none added when tasks change.

This is the path a GPU takes (transformers compiles decode with a static cache there): attention is one operator, whose
kernels are interpreted here. The CPU's own backend reads task ids on the host and is not meant to be compiled.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

import prefix_attn as pa
from prefix_attn import dispatch
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import tiny_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

#: Head dims the kernels take; the tiny models' 8 is too small for them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16}, "gemma3_text": {}, "gpt2": {"n_head": 2}, "gpt_oss": {},
}  # fmt: skip


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


def compiled(model: Any) -> tuple[Any, CompileCounter]:
    """The model compiled as a whole, and the counter of its graphs."""
    torch.compiler.reset()
    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_add_no_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda call, backend: choose(call, "triton"))
    model = tiny_model(family, **FAMILIES[family])
    with torch.no_grad():
        step, counter = compiled(model)
        decode(model, step)
        unpatched_graphs = counter.frame_count
        bank = make_bank(model)
        pa.patch(model, bank)
        step, counter = compiled(model)
        for tasks in (TASKS, [None, "nine", "nine", "five"]):
            ids = bank.task_ids(tasks)
            for ours, eager in zip(decode(model, step, task_ids=ids), decode(model, model, task_ids=ids), strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == unpatched_graphs
