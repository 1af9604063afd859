"""Every mode of generate gives the tokens that greedy generation, proven equal to PEFT, gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import prefix_attn as pa
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import tiny_model

GREEDY = {"max_new_tokens": 10, "do_sample": False}


def test_names_ids_and_tensors_are_the_same(patched: Any) -> None:
    inputs = padded_inputs()
    by_name = patched.generate(**inputs, **GREEDY, task_ids=TASKS)
    for task_ids in ([0, 2, None, 1], [0, 2, -1, 1], torch.tensor([0, 2, -1, 1])):
        assert torch.equal(patched.generate(**inputs, **GREEDY, task_ids=task_ids), by_name)


def test_static_cache(patched: Any) -> None:
    inputs = padded_inputs()
    expected = patched.generate(**inputs, **GREEDY, task_ids=TASKS)
    assert torch.equal(patched.generate(**inputs, **GREEDY, task_ids=TASKS, cache_implementation="static"), expected)


def test_static_cache_without_tasks(patched: Any) -> None:
    inputs = padded_inputs()
    got = patched.generate(**inputs, **GREEDY, cache_implementation="static")
    pa.unpatch(patched)
    assert torch.equal(patched.generate(**inputs, **GREEDY, cache_implementation="static"), got)


def test_without_cache(patched: Any) -> None:
    inputs = padded_inputs()
    expected = patched.generate(**inputs, **GREEDY, task_ids=TASKS)
    assert torch.equal(patched.generate(**inputs, **GREEDY, task_ids=TASKS, use_cache=False), expected)


def test_without_mask(patched: Any) -> None:
    inputs = padded_inputs(paddings=(0, 0, 0, 0))
    expected = patched.generate(**inputs, **GREEDY, task_ids=TASKS)
    assert torch.equal(patched.generate(inputs["input_ids"], **GREEDY, task_ids=TASKS), expected)


def test_inputs_embeds(patched: Any) -> None:
    inputs = padded_inputs()
    expected = patched.generate(**inputs, **GREEDY, task_ids=TASKS)
    embeds = patched.get_input_embeddings()(inputs["input_ids"])
    got = patched.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **GREEDY, task_ids=TASKS)
    assert torch.equal(got, expected[:, 8:])


def test_continuing_a_cache(patched: Any) -> None:
    """Two turns on one cache equal one turn over the whole conversation."""
    first = padded_inputs()
    cache = DynamicCache(config=patched.config)
    turn = patched.generate(
        **first, max_new_tokens=3, do_sample=False, task_ids=TASKS, past_key_values=cache, eos_token_id=-1
    )
    more = torch.randint(3, 99, (4, 4), generator=torch.Generator().manual_seed(1))
    conversation = {"input_ids": torch.cat([turn, more], dim=1)}
    padding = first["attention_mask"]
    conversation["attention_mask"] = torch.cat([padding, torch.ones(4, 7, dtype=torch.long)], dim=1)
    got = patched.generate(**conversation, **GREEDY, task_ids=TASKS, past_key_values=cache)
    assert torch.equal(got, patched.generate(**conversation, **GREEDY, task_ids=TASKS))


def test_chunked_prefill(patched: Any) -> None:
    inputs = padded_inputs(length=15)
    expected = patched.generate(**inputs, **GREEDY, task_ids=TASKS)
    assert torch.equal(patched.generate(**inputs, **GREEDY, task_ids=TASKS, prefill_chunk_size=4), expected)


def test_a_row_of_a_mixed_batch_equals_the_row_alone(patched: Any) -> None:
    inputs = padded_inputs()
    with torch.no_grad():
        mixed = patched(**inputs, task_ids=TASKS).logits
        for row, task in enumerate(TASKS):
            alone = patched(**{n: x[row : row + 1] for n, x in inputs.items()}, task_ids=[task]).logits[0]
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(mixed[row, real], alone[real], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("family", "attention"), [
    *((family, attention) for family in ("llama", "gemma3_text", "gpt2", "opt") for attention in ("sdpa", "eager")),
    ("gpt_oss", "eager"),
])  # fmt: skip
def test_without_task_ids_nothing_changes(family: str, attention: str) -> None:
    """Bits, not tolerances: forward, generate with each cache, and a mask with holes that tasks would not allow."""
    model = tiny_model(family)
    model.set_attn_implementation(attention)

    def outputs() -> list[torch.Tensor]:
        inputs = padded_inputs()
        holes = inputs["attention_mask"].clone()
        holes[:, 6] = 0
        with torch.no_grad():
            return [
                model(**inputs).logits, model(inputs["input_ids"]).logits,
                model(inputs["input_ids"], attention_mask=holes).logits,
                model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY, num_beams=2),
                model.generate(**inputs, **GREEDY, cache_implementation="static"),
            ]  # fmt: skip

    before = outputs()
    pa.patch(model, make_bank(model))
    while_patched = outputs()
    pa.unpatch(model)
    for a, b, c in zip(before, while_patched, outputs(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_gradients_reach_the_model_through_the_prefix(patched: Any) -> None:
    """Fine-tuning under a fixed prefix: same gradients as with the prefix in a plain cache."""
    inputs = padded_inputs(paddings=(0, 0))
    logits = patched(**inputs, task_ids=["five", "nine"], use_cache=False).logits
    logits.square().mean().backward()
    gradients = [p.grad for p in patched.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients if g is not None)
    assert sum(g is not None and bool(g.abs().max() > 0) for g in gradients) > len(gradients) // 2
    patched.zero_grad()
