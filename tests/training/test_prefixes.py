"""Prefixes as parameters: what a batch of several tasks learns is what PEFT learns, one task at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import prefix_attn as pa
from prefix_attn.hf.wiring import bank_of
from prefix_attn.training import TrainablePrefixes
from tests.hf.families import random_prefix, tiny_model
from tests.hf.peft_oracle import prefix_tuned
from tests.hf.shrink import tiny_random_model
from tests.hf.survey import random_bank
from tests.seq2seq import tiny_seq2seq

LENGTHS = {"five": 5, "twelve": 12}
TASKS = ["five", "twelve", "five", "twelve"]


def batch(rows: int = 4, tokens: int = 7) -> dict[str, Tensor]:
    """Random tokens, padded on the right as PEFT's training counts positions."""
    ids = torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def loss_of(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """A sum over rows, each with a weight of its own, so that rows cannot be confused."""
    picked = logits.log_softmax(-1).gather(2, inputs["input_ids"][..., None])[..., 0] * inputs["attention_mask"]
    return (picked.sum(1) * torch.arange(1, len(picked) + 1)).sum()


def starts(model: Any) -> dict[str, Any]:
    return {name: random_prefix(model, m, seed) for seed, (name, m) in enumerate(LENGTHS.items())}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_oss", "opt"])
def test_gradients_of_a_mixed_batch_are_those_of_peft(family: str) -> None:
    model, inputs = tiny_model(family), batch()
    prefixes = TrainablePrefixes(model, starts(model), projection=None)
    with prefixes.attached(model):
        loss_of(model(**inputs, task_ids=TASKS, use_cache=False).logits, inputs).backward()
    for seed, (name, m) in enumerate(LENGTHS.items()):
        theirs = prefix_tuned(tiny_model(family), m, seed).eval()
        rows = torch.tensor([task == name for task in TASKS])
        mine = {key: value * rows[:, None] if key == "attention_mask" else value for key, value in inputs.items()}
        logits = torch.stack([theirs(**{k: v[i : i + 1] for k, v in inputs.items()}).logits[0] for i in range(4)])
        loss_of(logits, mine).backward()
        (ours,) = prefixes.parameters_of(name)
        expected = theirs.prompt_encoder["default"].embedding.weight.grad
        torch.testing.assert_close(ours.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
        assert expected.abs().max() > 0.1


@pytest.mark.parametrize("projection", [None, 8])
def test_the_start_is_what_was_given(projection: int | None) -> None:
    model, inputs = tiny_model("llama"), batch()
    given = starts(model)
    prefixes = TrainablePrefixes(model, given, projection)
    bank = pa.PrefixBank.for_model(model)
    for name, key_values in given.items():
        bank.add(name, key_values)
        for now, then in zip(prefixes.key_values(name), key_values, strict=True):
            assert torch.equal(now[0], then[0])
            assert torch.equal(now[1], then[1])
    pa.patch(model, bank)
    with torch.no_grad():
        expected = model(**inputs, task_ids=TASKS, use_cache=False).logits
        with prefixes.attached(model):
            assert torch.equal(model(**inputs, task_ids=TASKS, use_cache=False).logits, expected)


@pytest.mark.parametrize("projection", [None, 8])
def test_a_step_moves_only_the_tasks_of_the_batch(projection: int | None) -> None:
    model, inputs = tiny_model("llama"), batch()
    prefixes = TrainablePrefixes(model, starts(model), projection)
    with prefixes.attached(model):
        loss_of(model(**inputs, task_ids=["five", None, "five", None], use_cache=False).logits, inputs).backward()
    assert all(p.grad.abs().max() == 0 for p in prefixes.parameters_of("twelve"))
    assert any(p.grad.abs().max() > 0 for p in prefixes.parameters_of("five"))


def test_what_was_learnt_is_what_a_bank_serves() -> None:
    """The same tokens and logits, in training and from a plain bank afterwards."""
    model, inputs = tiny_model("gemma3_text"), batch()
    prefixes = TrainablePrefixes(model, starts(model))
    optimizer = torch.optim.SGD(prefixes.parameters(), lr=1e-2)
    options = {"task_ids": TASKS, "max_new_tokens": 4, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    inputs["attention_mask"][:] = 1
    with prefixes.attached(model):
        before = model.generate(**inputs, **options)
        loss_of(model(**inputs, task_ids=TASKS, use_cache=False).logits, inputs).backward()
        optimizer.step()
        after = model.generate(**inputs, **options)
    bank = pa.PrefixBank.for_model(model)
    for name in LENGTHS:
        bank.add(name, prefixes.key_values(name), source="trained")
    pa.patch(model, bank)
    served = model.generate(**inputs, **options)
    assert all(map(torch.equal, after.logits, served.logits))
    assert not torch.equal(before.logits[0], served.logits[0])


def test_a_model_in_bfloat16_has_parameters_in_float32() -> None:
    model, inputs = tiny_model("llama").bfloat16(), batch()
    prefixes = TrainablePrefixes(model, starts(model), projection=None)
    with prefixes.attached(model):
        loss_of(model(**inputs, task_ids=TASKS, use_cache=False).logits.float(), inputs).backward()
    for name in LENGTHS:
        (rows,) = prefixes.parameters_of(name)
        assert rows.dtype == rows.grad.dtype == torch.float32
        assert prefixes.key_values(name)[0][0].dtype == torch.bfloat16


def test_a_hybrid_learns_in_the_layers_that_keep_keys() -> None:
    model = tiny_random_model("lfm2")
    stored = random_bank(model)
    prefixes = TrainablePrefixes(model, {name: stored.key_values(name) for name in stored.names}, projection=None)
    ids, tasks = torch.randint(3, 60, (len(stored), 6)), stored.names
    with prefixes.attached(model):
        logits = model(input_ids=ids, task_ids=tasks, use_cache=False).logits
        logits.square().sum().backward()
    pa.patch(model, stored)
    assert torch.equal(model(input_ids=ids, task_ids=tasks, use_cache=False).logits, logits)
    assert all(p.grad.abs().min() > 0 for name in tasks for p in prefixes.parameters_of(name))


@pytest.mark.parametrize("family", ["deepseek_v3", "bloom"])
@pytest.mark.filterwarnings("ignore::prefix_attn.SlowModel")
def test_families_whose_layers_read_no_bank_are_refused(family: str) -> None:
    """Latent attention makes keys of what the bank holds; the slow way copies a prefix into a cache."""
    model = tiny_random_model(family)
    stored = random_bank(model)
    prefixes = TrainablePrefixes(model, {name: stored.key_values(name) for name in stored.names})
    with pytest.raises(pa.UnsupportedModel, match="gradients do not pass"), prefixes.attached(model):
        pass
    assert bank_of(model) is None


def test_a_patched_model_gets_its_bank_back() -> None:
    model = tiny_model("llama")
    bank = pa.PrefixBank.for_model(model)
    bank.add("old", random_prefix(model, 3, 9))
    pa.patch(model, bank)
    prefixes = TrainablePrefixes(model, starts(model))
    expected = model(**batch(2), task_ids=["old", None]).logits
    with pytest.raises(pa.UnknownTask), prefixes.attached(model):
        model(**batch(2), task_ids=["five", "old"])
    assert torch.equal(model(**batch(2), task_ids=["old", None]).logits, expected)
    with pytest.raises(pa.UnknownTask):
        model(**batch(2), task_ids=["five", None])
    pa.unpatch(model)
    with prefixes.attached(model):
        assert bank_of(model) is prefixes.bank
    assert bank_of(model) is None
    assert not model._forward_pre_hooks


def test_parameters_that_are_written_in_any_way_count() -> None:
    """Autograd does not count what goes through ``.data``, as moving averages of weights do."""
    model, inputs = tiny_model("llama"), batch()
    prefixes = TrainablePrefixes(model, starts(model), projection=None)
    with torch.no_grad(), prefixes.attached(model):
        before = model.model(**inputs, task_ids=TASKS).last_hidden_state
        for parameter in prefixes.parameters():
            parameter.data += 1.0
        assert not torch.equal(model.model(**inputs, task_ids=TASKS).last_hidden_state, before)


@pytest.mark.parametrize("backward", ["inside", "after a pass of another", "outside"])
def test_checkpointing_goes_back_to_the_prefixes_of_its_pass(backward: str) -> None:
    """Layers run again in the backward pass, when the bank may have been used otherwise."""
    gradients = []
    for checkpointing in (False, True):
        model, inputs = tiny_model("llama"), batch()
        bank = pa.PrefixBank.for_model(model)
        bank.add("old", random_prefix(model, 3, 9))
        prefixes = TrainablePrefixes(pa.patch(model, bank), starts(model), projection=None)
        for parameter in prefixes.parameters():
            parameter.data += 1.0
        model.train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with prefixes.attached(model):
            loss = loss_of(model(**inputs, task_ids=TASKS, use_cache=False).logits, inputs)
            if backward == "after a pass of another":
                with prefixes.attached(model), torch.no_grad():
                    model(**inputs, task_ids=TASKS[::-1], use_cache=False)
            if backward == "inside":
                loss.backward()
        if backward != "inside":
            loss.backward()
        gradients.append([parameter.grad for parameter in prefixes.parameters()])
    assert all(map(torch.equal, *gradients))


def test_copies_and_pickles_while_it_trains(tmp_path: Path) -> None:
    model, inputs = tiny_model("llama"), batch()
    prefixes = TrainablePrefixes(model, starts(model))
    with prefixes.attached(model):
        loss_of(model(**inputs, task_ids=TASKS, use_cache=False).logits, inputs).backward()
        torch.save(prefixes, tmp_path / "prefixes.pt")
        twins = [copy.deepcopy(prefixes), torch.load(tmp_path / "prefixes.pt", weights_only=False)]
    for twin in twins:
        for mine, theirs in zip(prefixes.key_values("five"), twin.key_values("five"), strict=True):
            assert torch.equal(mine[0], theirs[0])
        assert twin.bank.prefixes is twin


@pytest.mark.parametrize("projection", [None, 8])
def test_parameters_are_float32_whatever_the_default(projection: int | None) -> None:
    model = tiny_model("llama")
    torch.set_default_dtype(torch.bfloat16)
    try:
        prefixes = TrainablePrefixes(model, starts(model), projection)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in prefixes.parameters()} == {torch.float32}


def test_key_values_are_copies() -> None:
    model = tiny_model("llama")
    prefixes = TrainablePrefixes(model, starts(model), projection=None)
    taken = prefixes.key_values("five")[0][0]
    assert not taken.requires_grad
    before = taken.clone()
    for parameter in prefixes.parameters():
        parameter.data += 1.0
    assert torch.equal(taken, before)


def test_a_state_dict_fits_its_own_tasks_alone(tmp_path: Path) -> None:
    """Also one that safetensors kept, as Trainer and accelerate save them."""
    model = tiny_model("llama")
    prefixes = TrainablePrefixes(model, starts(model))
    save_file(prefixes.state_dict(), tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    prefixes.load_state_dict(state)
    other = TrainablePrefixes(model, dict(reversed(starts(model).items())))
    with pytest.raises(pa.IncompatiblePrefix, match="expected one of the tasks"):
        other.load_state_dict(state, strict=False)


def test_the_bank_in_training_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prefixes = TrainablePrefixes(model, starts(model))
    with prefixes.attached(model), pytest.raises(pa.UnsupportedModel, match="being trained"):
        prefixes.bank.save_pretrained(tmp_path)
    for parameter in prefixes.parameters():
        parameter.data += 1.0
    for (k, _), (now, _) in zip(prefixes.bank.key_values("five"), prefixes.key_values("five"), strict=True):
        assert torch.equal(k, now)


def test_a_refusal_leaves_a_patched_lora_model_as_it_was() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    other.model.embed_tokens.weight.data += 1
    bank = pa.PrefixBank.for_model(model)
    bank.add("old", random_prefix(model, 3, 9))
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    pa.patch(lora, bank)
    expected = lora(**batch(2), task_ids=["old", None]).logits
    with pytest.raises(pa.IncompatiblePrefix), TrainablePrefixes(other, starts(other)).attached(lora):
        pass
    assert torch.equal(lora(**batch(2), task_ids=["old", None]).logits, expected)
    assert not torch.equal(lora(**batch(2)).logits[0], expected[0])


def test_refusals() -> None:
    model = tiny_model("llama")
    prefixes = TrainablePrefixes(model, starts(model))
    for ask in (prefixes.key_values, prefixes.parameters_of):
        with pytest.raises(pa.UnknownTask, match=r"expected one of \['five', 'twelve'\], got 'six'"):
            ask("six")
    with pytest.raises(pa.IncompatiblePrefix, match="at least one task"):
        TrainablePrefixes(model, {})
    with pytest.raises(pa.IncompatiblePrefix, match=r"start\['none'\]: expected a prefix of at least one token"):
        TrainablePrefixes(model, {"none": random_prefix(model, 0, 0)})
    with pytest.raises(pa.IncompatiblePrefix, match="layer"):
        TrainablePrefixes(model, {"short": random_prefix(model, 3, 0)[:1]})
    with pytest.raises(pa.UnsupportedModel, match="train them with PEFT"):
        TrainablePrefixes(tiny_seq2seq("t5"), {"x": random_prefix(model, 3, 0)})
    other = tiny_model("llama")
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(pa.IncompatiblePrefix), TrainablePrefixes(model, starts(model)).attached(other):
        pass
