"""What `generate` and the forward pass promise beside the matrix of modes: inputs, refusals, context, training."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

import prefix_attn as pa
from tests.hf.conftest import TASKS, make_bank, padded_inputs, replica
from tests.hf.families import random_prefix, tiny_model
from tests.hf.peft_oracle import PeftOracle
from tests.tolerance import assert_close

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


def test_names_ids_and_tensors_are_the_same(patched: Any) -> None:
    inputs = padded_inputs()
    by_name = patched.generate(**inputs, **GREEDY, task_ids=TASKS)
    for task_ids in ([0, 2, None, 1], [0, 2, -1, 1], torch.tensor([0, 2, -1, 1])):
        assert torch.equal(patched.generate(**inputs, **GREEDY, task_ids=task_ids), by_name)


def test_static_cache_without_tasks(patched: Any) -> None:
    inputs = padded_inputs()
    got = patched.generate(**inputs, **GREEDY, cache_implementation="static")
    pa.unpatch(patched)
    assert torch.equal(patched.generate(**inputs, **GREEDY, cache_implementation="static"), got)


def test_without_mask(patched: Any) -> None:
    inputs = padded_inputs(paddings=(0, 0, 0, 0))
    expected = patched.generate(**inputs, **GREEDY, task_ids=TASKS)
    assert torch.equal(patched.generate(inputs["input_ids"], **GREEDY, task_ids=TASKS), expected)


def test_from_the_bos_token_alone(patched: Any) -> None:
    """No prompt at all: as many rows as tasks."""
    prompts = torch.full((4, 1), patched.generation_config.bos_token_id)
    got = patched.generate(**GREEDY, task_ids=TASKS)
    assert torch.equal(got, patched.generate(prompts, **GREEDY, task_ids=TASKS))


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


@pytest.mark.parametrize(("options", "reason"), [
    ({"output_attentions": True, "return_dict_in_generate": True}, "attention weights"),
    ({"token_healing": True}, "heal"),
    ({"cache_implementation": "paged"}, "generate_batch"),
    ({"truncation": True, "attention_mask": None}, "attention_mask"),
])  # fmt: skip
def test_what_cannot_be_exact_is_refused(patched: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(pa.PrefixAttnError, match=reason):
        patched.generate(**(padded_inputs() | GREEDY | options), task_ids=TASKS)


def test_a_cache_is_continued_with_its_own_tasks(patched: Any) -> None:
    inputs = padded_inputs()
    turn = patched.generate(**inputs, **GREEDY, task_ids=TASKS, return_dict_in_generate=True, eos_token_id=98)
    with torch.no_grad():
        step = patched(**inputs, task_ids=TASKS)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 10, dtype=torch.long)], dim=1)
    after = {"input_ids": turn.sequences, "attention_mask": mask, "past_key_values": turn.past_key_values}
    for wrong in ({}, {"task_ids": ["five", "five", None, "nine"]}, {"task_ids": [None] * 4}):
        with pytest.raises(pa.IncompatiblePrefix, match="were computed"):
            patched.generate(**after, **GREEDY, **wrong)
        with pytest.raises(pa.IncompatiblePrefix, match="were computed"):
            patched(turn.sequences[:, 8:9], attention_mask=mask[:, :9], past_key_values=step.past_key_values, **wrong)
    patched.generate(**after, **GREEDY, task_ids=TASKS)
    for tasks in (TASKS, ["nine"] * 4):  # transformers keeps a static cache for the next call, and clears it
        patched.generate(**inputs, **GREEDY, task_ids=tasks, cache_implementation="static")


def test_truncation_drops_each_rows_oldest_tokens(patched: Any) -> None:
    """128 positions: a row with a prefix of m keeps 128 - m - 9 of its tokens, and answers as if it had only these."""
    inputs = padded_inputs(length=125)
    with pytest.raises(pa.ContextOverflow, match="row 0"):
        patched.generate(**inputs, **GREEDY, task_ids=TASKS)
    got = patched.generate(**inputs, **GREEDY, task_ids=TASKS, truncation=True)
    assert torch.equal(got[:, :125], inputs["input_ids"]), "the prompt comes back whole"
    for row, m in enumerate((5, 12, 0, 9)):
        keep = 128 - m - 9
        mask = inputs["attention_mask"][row : row + 1].clone()
        mask[:, : 125 - keep] = 0
        alone = {"input_ids": inputs["input_ids"][row : row + 1], "attention_mask": mask}
        alone |= {"input_ids": alone["input_ids"] * mask}  # what was dropped is not read
        expected = patched.generate(**alone, **GREEDY, task_ids=[TASKS[row]])[0, 125:]
        assert torch.equal(got[row, 125 : 125 + len(expected)], expected)
    short = padded_inputs()
    assert torch.equal(
        patched.generate(**short, **GREEDY, task_ids=TASKS, truncation=True),
        patched.generate(**short, **GREEDY, task_ids=TASKS),
    )
    with pytest.raises(pa.ContextOverflow, match="row 1"):
        patched.generate(**inputs, max_new_tokens=120, task_ids=TASKS, truncation=True)


def test_room_is_what_is_left_of_the_context() -> None:
    """128 positions: 119 own tokens behind a prefix of 9 are enough, one more is too many."""
    model = tiny_model("llama")
    bank = make_bank(model)
    pa.patch(model, bank)
    room = bank.room("nine")
    assert room == 119
    with torch.no_grad():
        model(padded_inputs(length=room)["input_ids"], task_ids=["nine"] * 4)
        with pytest.raises(pa.ContextOverflow):
            model(padded_inputs(length=room + 1)["input_ids"], task_ids=["nine"] * 4)


@pytest.mark.parametrize(("family", "layers"), [("mistral", (0, 1)), ("gemma3_text", (0,))])
def test_the_bank_says_which_layers_slide(family: str, layers: tuple[int, ...]) -> None:
    bank = make_bank(tiny_model(family))
    assert bank.sliding_window is not None
    assert (bank.sliding_window.tokens, bank.sliding_window.layers) == (12, layers)
    assert f"{len(layers)} of 2 layers see 12 tokens" in repr(bank)
    plain = make_bank(tiny_model("llama"))
    assert plain.sliding_window is None
    assert "sliding" not in repr(plain)


def test_a_window_hides_what_the_bank_says() -> None:
    """A window of 12 behind a prefix of 9: own tokens up to 2 see its first slot, tokens up to 10 its last."""
    model = tiny_model("mistral", num_hidden_layers=1)
    bank = pa.PrefixBank.for_model(model)
    ((k, v),) = random_prefix(model, 9, seed=0)
    first, last = v.clone(), v.clone()
    first[:, 0], last[:, 8] = 9.0, 9.0
    for name, values in (("plain", v), ("first", first), ("last", last)):
        bank.add(name, [(k, values)])
    pa.patch(model, bank)
    tokens = padded_inputs(length=14, paddings=(0,))["input_ids"].expand(3, -1)
    with torch.no_grad():
        plain, other_first, other_last = model(tokens, task_ids=["plain", "first", "last"]).logits
    for other, sees in ((other_first, range(12 - 9)), (other_last, range(12 - 1))):
        assert [i for i in range(14) if not torch.equal(other[i], plain[i])] == list(sees)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_compiled_generate(family: str) -> None:
    """transformers' own compilation of decode, as a GPU gets it by default; other tasks need no other graph."""
    model = tiny_model(family)
    pa.patch(model, make_bank(model))
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    for tasks in (TASKS, ["nine", None, "five", "five"]):
        expected = model.generate(**padded_inputs(), **GREEDY, task_ids=tasks)
        with torch._dynamo.config.patch(error_on_recompile=tasks is not TASKS):
            assert torch.equal(model.generate(**padded_inputs(), **GREEDY, **compiled, task_ids=tasks), expected)
    torch.compiler.reset()


def test_gradients_equal_those_of_a_replicated_prefix(patched: Any) -> None:
    """Fine-tuning under a fixed prefix, with and without gradient checkpointing."""
    bank, tasks = patched._prefix_attn.bank, ["five", "nine"]
    tokens = padded_inputs(paddings=(0,))["input_ids"]

    def gradients(*losses: torch.Tensor) -> list[torch.Tensor | None]:
        patched.zero_grad()
        for loss in losses:
            loss.backward()
        return [p.grad.clone() if p.grad is not None else None for p in patched.parameters()]

    both = {"input_ids": tokens.expand(2, -1), "labels": tokens.expand(2, -1)}
    plain = gradients(patched(**both, task_ids=tasks, use_cache=False).loss)
    getattr(patched, "activation_checkpointing_enable", patched.gradient_checkpointing_enable)()
    patched.train()
    for module in patched.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with_checkpoints = gradients(patched(**both, task_ids=tasks, use_cache=False).loss)
    patched.eval()
    getattr(patched, "activation_checkpointing_disable", patched.gradient_checkpointing_disable)()

    losses = [patched(tokens, labels=tokens, **replica(patched, bank, task)).loss / 2 for task in tasks]
    for expected, *got in zip(gradients(*losses), plain, with_checkpoints, strict=True):
        for gradient in got:
            if expected is None:
                assert gradient is None or not gradient.any()
            else:
                torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_is_as_exact_as_peft_under_autocast(family: str, tmp_path: Path) -> None:
    peft = PeftOracle(family, tmp_path, {"nine": 9})
    model = tiny_model(family)
    bank = pa.PrefixBank.for_model(model)
    bank.load("nine", peft.paths["nine"])
    pa.patch(model, bank)
    tokens = padded_inputs(paddings=(0, 0))["input_ids"]
    exact = peft.logits("nine", input_ids=tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        eager = peft.logits("nine", input_ids=tokens)
        ours = model(tokens, task_ids=["nine"] * 2).logits
    assert ours.dtype == eager.dtype
    assert_close("logits under autocast", ours, eager, exact.double())


def test_tasks_in_a_config_are_refused(patched: Any) -> None:
    """A config keeps whatever it is given."""
    inputs, config = padded_inputs(), GenerationConfig(task_ids=TASKS, max_new_tokens=2)
    for call in (
        lambda: patched.generate(**inputs, generation_config=config),
        lambda: patched.generate(inputs["input_ids"], config, attention_mask=inputs["attention_mask"]),
    ):
        with pytest.raises(pa.PrefixAttnError, match="expected task_ids beside it"):
            call()
    patched.generation_config.task_ids = TASKS
    with pytest.raises(pa.PrefixAttnError, match="expected task_ids beside it"):
        patched.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("name", ["task", "tasks", "task_id"])
def test_other_names_for_task_ids_are_refused(patched: Any, name: str) -> None:
    with pytest.raises(pa.PrefixAttnError, match=f"{name}: expected task_ids"):
        patched(**padded_inputs(), **{name: TASKS})
    with pytest.raises(pa.PrefixAttnError, match=f"{name}: expected task_ids"):
        patched.generate_batch([[5, 6]] * 4, **{name: TASKS})


def test_help_shows_what_is_ours(patched: Any) -> None:
    assert {"task_ids", "truncation"} <= inspect.signature(patched.generate).parameters.keys()
    assert "one name, id or None per row" in patched.generate.__doc__
