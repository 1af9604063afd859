"""The patch as an object: reversible, idempotent, private to one model, and loud about what it cannot do."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import prefix_attn as pa
from prefix_attn.bank import PrefixBank
from prefix_attn.plan import BatchPlan
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import LLAMA_LIKE, random_prefix, tiny_model
from tests.hf.shrink import tiny_random_model
from tests.hf.survey import random_bank

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def llama() -> Any:
    model = tiny_model("llama")
    return pa.patch(model, make_bank(model))


def attributes(model: Any) -> dict[str, Any]:
    """Everything a patch could leave behind: instance attributes, configs, hooks."""
    return {
        name: (sorted(module.__dict__), id(getattr(module, "config", None)), len(module._forward_pre_hooks),
               len(module._forward_pre_hooks_with_kwargs), len(module._forward_hooks))
        for name, module in model.named_modules()
    }  # fmt: skip


def test_unpatch_leaves_nothing_behind() -> None:
    model = tiny_model("llama")
    before, implementation = attributes(model), model.config._attn_implementation
    pa.patch(model, make_bank(model))
    assert attributes(model) != before
    assert pa.unpatch(model) is model
    assert attributes(model) == before
    assert model.config._attn_implementation == implementation
    pa.unpatch(model)
    with pytest.raises(ValueError, match="task_ids"):
        model.generate(**padded_inputs(), **GREEDY, task_ids=TASKS)


def test_patching_twice_is_patching_once(llama: Any) -> None:
    expected, once = llama.generate(**padded_inputs(), **GREEDY, task_ids=TASKS), attributes(llama)
    pa.patch(llama, llama._prefix_attn.bank)
    assert {n: x[2:] for n, x in attributes(llama).items()} == {n: x[2:] for n, x in once.items()}
    assert torch.equal(llama.generate(**padded_inputs(), **GREEDY, task_ids=TASKS), expected)


def test_another_bank_replaces_the_first(llama: Any) -> None:
    bank = pa.PrefixBank.for_model(llama)
    bank.add("other", random_prefix(llama, 4, seed=9))
    pa.patch(llama, bank)
    llama.generate(**padded_inputs(), **GREEDY, task_ids=["other"] * 4)
    with pytest.raises(pa.UnknownTask, match="other"):
        llama.generate(**padded_inputs(), **GREEDY, task_ids=TASKS)


@pytest.mark.parametrize(
    ("options", "inference", "kept"),
    [({}, False, True), ({}, True, True), ({"num_beams": 2}, False, False)],
    ids=["greedy", "inference mode", "beams"],
)
def test_all_steps_of_a_generation_share_one_plan(
    llama: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], inference: bool, kept: bool
) -> None:
    """It knows how many tasks the batch has, unless rows are copied for beams: then it is found out on the device."""
    bank, plans = llama._prefix_attn.bank, list[BatchPlan]()

    def plans_of(*args: Any) -> Any:
        found = PrefixBank.plans(bank, *args)
        plans.append(found[bank.device])
        return found

    monkeypatch.setattr(bank, "plans", plans_of)
    with torch.inference_mode(inference):
        llama.generate(**padded_inputs(), **GREEDY, **options, task_ids=TASKS)
    before, *steps = plans
    assert len(steps) == 6
    assert all(step is steps[0] for step in steps)
    assert (steps[0] is before) == kept
    assert before.distinct == len(set(TASKS) - {None})
    assert steps[0].distinct == (before.distinct if kept else None)


def test_a_model_sharing_the_config_is_not_touched() -> None:
    config = transformers.LlamaConfig(**LLAMA_LIKE)
    ours, bystander = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    expected = bystander(**padded_inputs()).logits
    pa.patch(ours, make_bank(ours))
    assert torch.equal(bystander(**padded_inputs()).logits, expected)


def test_added_and_removed_tasks_are_seen_at_once(llama: Any) -> None:
    bank = llama._prefix_attn.bank
    inputs = padded_inputs(paddings=(0,))
    before = llama.generate(**inputs, **GREEDY, task_ids=["nine"])
    bank.remove("five")
    bank.add("new", random_prefix(llama, 3, seed=7))
    assert torch.equal(llama.generate(**inputs, **GREEDY, task_ids=["nine"]), before)
    llama.generate(**inputs, **GREEDY, task_ids=["new"])
    for gone in ("five", 0, torch.tensor([0])):
        with pytest.raises(pa.UnknownTask):
            llama.generate(**inputs, **GREEDY, task_ids=gone if isinstance(gone, torch.Tensor) else [gone])


def test_save_pretrained_saves_the_plain_model(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    pa.unpatch(llama)
    assert torch.equal(again(**padded_inputs()).logits, llama(**padded_inputs()).logits)


def test_two_patched_models_at_once(llama: Any) -> None:
    """Calls that take turns, of models with other masks, positions and banks, one of them without tasks in between."""
    other = tiny_model("gemma3_text")
    bank = pa.PrefixBank.for_model(other)
    bank.add("five", random_prefix(other, 7, seed=4))
    pa.patch(other, bank)
    calls = [
        (llama, {"task_ids": TASKS}),
        (other, {"task_ids": ["five", None, "five", None]}),
        (llama, {}),
        (other, {}),
    ]
    alone = [model.generate(**padded_inputs(), **GREEDY, **options) for model, options in calls]
    for i in (1, 0, 3, 2, 0, 1):
        model, options = calls[i]
        assert torch.equal(model.generate(**padded_inputs(), **GREEDY, **options), alone[i])
    pa.unpatch(llama)
    assert torch.equal(other.generate(**padded_inputs(), **GREEDY, **calls[1][1]), alone[1])


@pytest.mark.parametrize(("family", "reason"), [("llama4_text", "chunked"), ("longt5", "positions are known")])
def test_families_it_cannot_serve_are_refused_by_name(family: str, reason: str) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    if family == "llama4_text":
        sizes |= {"intermediate_size": 48, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8,
                  "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
    if family == "longt5":
        sizes = {"vocab_size": 99, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    config = transformers.AutoConfig.for_model(family, **sizes)
    auto = transformers.AutoModelForSeq2SeqLM if family == "longt5" else AutoModelForCausalLM
    model = auto.from_config(config)
    bank = pa.PrefixBank.for_model(tiny_model("llama"))
    with pytest.raises(pa.UnsupportedModel, match=reason) as refused:
        pa.patch(model, bank)
    assert type(model).__name__ in str(refused.value)
    assert "_prefix_attn" not in model.__dict__


@pytest.mark.filterwarnings("ignore:served in the slow way")
@pytest.mark.parametrize("family", ["llama", "gpt_neox_japanese"])
def test_a_patch_leaves_modes_of_parts_alone_and_verifies(family: str) -> None:
    model = tiny_random_model(family)
    model.train()
    frozen = next(module for name, module in model.named_modules() if name.endswith("0"))
    frozen.eval()
    bank = random_bank(model)
    pa.patch(model, bank, verify=True)
    assert (model.training, frozen.training) == (True, False)
    with pytest.raises(pa.PrefixAttnError, match="at least one task"):
        pa.patch(model, pa.PrefixBank.for_model(model), verify=True)
    assert model._prefix_attn.bank is bank


def test_a_bank_of_another_model_is_refused_and_nothing_changes(llama: Any) -> None:
    other = tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    before = attributes(other)
    with pytest.raises(pa.IncompatiblePrefix):
        pa.patch(other, llama._prefix_attn.bank)
    assert attributes(other) == before


def test_wrong_number_of_tasks(llama: Any) -> None:
    for call in (llama, lambda **kw: llama.generate(**kw, **GREEDY)):
        with pytest.raises(pa.ShapeError, match="4 in all"):
            call(**padded_inputs(), task_ids=["five", "nine"])


def test_unknown_task_lists_the_choices(llama: Any) -> None:
    with pytest.raises(pa.UnknownTask, match=r"five.*nine.*twelve"):
        llama(**padded_inputs(), task_ids=["five", "six", None, "nine"])


def test_context_overflow(llama: Any) -> None:
    """128 positions: 110 tokens and a prefix of 12 fit; 30 more do not, nor do 120 tokens, known before any work."""
    inputs = padded_inputs(length=110)
    with torch.no_grad():
        llama(**inputs, task_ids=TASKS)
    hook = llama.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("a layer ran"))
    with pytest.raises(pa.ContextOverflow, match="row 0"):
        llama.generate(**inputs, task_ids=TASKS, max_new_tokens=30)
    with pytest.raises(pa.ContextOverflow, match="row 1"):
        llama(**padded_inputs(length=120), task_ids=TASKS)
    hook.remove()
    with torch.no_grad():
        llama(**padded_inputs(length=120), task_ids=[None] * 4)  # without prefix there is no overflow
    llama.generation_config.max_new_tokens = 100  # which None takes back
    made = llama.generate(**inputs, task_ids=TASKS, max_new_tokens=None, max_length=112)
    assert made.shape[1] == 112


def test_masks_that_do_not_say_what_becomes_of_the_prefix(llama: Any) -> None:
    inputs = padded_inputs()
    holes = inputs["attention_mask"].clone()
    holes[2, 5] = 0
    with pytest.raises(pa.UnsupportedModel, match="zeros between"):
        llama(inputs["input_ids"], attention_mask=holes, task_ids=TASKS)
    with pytest.raises(pa.UnsupportedModel, match="4D"):
        llama(inputs["input_ids"], attention_mask=torch.ones(4, 1, 8, 8, dtype=torch.bool), task_ids=TASKS)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(4, -1)
    with pytest.raises(pa.UnsupportedModel, match="packed"):
        llama(inputs["input_ids"], position_ids=packed, task_ids=TASKS, use_cache=False)
    with pytest.raises(pa.ShapeError, match="columns"):
        llama(inputs["input_ids"], attention_mask=inputs["attention_mask"][:, :5], task_ids=TASKS)


def test_right_padding_is_left_to_causality(llama: Any) -> None:
    inputs = padded_inputs(paddings=(0, 0, 0, 0))
    mask = inputs["attention_mask"].clone()
    mask[1, 6:] = 0
    with torch.no_grad():
        whole = llama(**inputs, task_ids=TASKS).logits
        padded = llama(inputs["input_ids"], attention_mask=mask, task_ids=TASKS).logits
    assert torch.equal(whole[1, :6], padded[1, :6])


def test_what_attention_cannot_give_is_refused(llama: Any) -> None:
    with pytest.raises(pa.UnsupportedModel, match="output_attentions"):
        llama(**padded_inputs(), task_ids=TASKS, output_attentions=True)
    model = tiny_model("llama", attention_dropout=0.1)
    pa.patch(model, make_bank(model)).train()
    with pytest.raises(pa.UnsupportedModel, match="dropout"):
        model(**padded_inputs(), task_ids=TASKS)


def test_a_model_that_drops_keywords_gets_its_batch_all_the_same() -> None:
    """nemotron's layers do not pass keywords on; without the model's own pass around it, a layer must not guess."""
    model = tiny_random_model("nemotron")
    plain = model(**padded_inputs()).logits
    pa.patch(model, make_bank(model))
    assert (model(**padded_inputs(), task_ids=TASKS).logits - plain).abs().max() > 0.1
    assert torch.equal(model(**padded_inputs()).logits, plain)
    layer = model.model.layers[0].self_attn
    with pytest.raises(pa.UnsupportedModel, match="outside a pass"):
        layer(torch.zeros(1, 1, 32), position_embeddings=model.model.rotary_emb(torch.zeros(1), torch.zeros(1, 1)))


def test_poison_in_other_prefixes_changes_no_bit(llama: Any) -> None:
    """NaN in every other task's prefix, in unused bank space and in padded keys."""
    bank = llama._prefix_attn.bank
    inputs = padded_inputs()
    tasks = ["nine", "nine", None, "nine"]
    with torch.no_grad():
        expected = llama(**inputs, task_ids=tasks).logits
        for i in range(bank.num_layers):
            prefix = bank.layer(i)
            start, m = prefix.spans[1]
            for x in (prefix.k, prefix.v):
                keep = x[:, start : start + m].clone()
                x.fill_(float("nan"))
                x[:, start : start + m] = keep
        got = llama(**inputs, task_ids=tasks).logits
    real = inputs["attention_mask"].bool()
    assert torch.equal(got[real], expected[real])


def test_an_unpatched_model_goes_with_its_last_user() -> None:
    """Not when garbage is collected: its weights may fill a GPU."""
    model = tiny_model("llama")
    pa.unpatch(pa.patch(model, make_bank(model)))
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
