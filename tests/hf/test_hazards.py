"""What people do to a patched model that it was not patched for: the answer stays right, or is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import save_file
from transformers import DynamicCache

import prefix_attn as pa
from prefix_attn.errors import PrefixAttnError
from prefix_attn.hf.assistant import Assistant
from prefix_attn.hf.sources import fill
from prefix_attn.hf.wiring import bank_of
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import tiny_model
from tests.hf.shrink import tiny_random_model
from tests.hf.survey import random_bank
from tests.hf.test_seq2seq import make_bank as make_seq2seq_bank
from tests.seq2seq import tiny_seq2seq

ROOT = Path(__file__).parents[2]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
X = padded_inputs(paddings=(0, 0, 0, 0))


def patched(family: str) -> Any:
    model = tiny_model(family)
    return pa.patch(model, make_bank(model))


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**(X | options)).logits
    return out


class TestConfig:
    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_another_implementation_of_attention_has_no_prefixes(self, family: str) -> None:
        model = tiny_seq2seq(family) if family == "t5" else tiny_model(family)
        bank = make_seq2seq_bank(model) if family == "t5" else make_bank(model)
        pa.patch(model, bank)
        inputs = X | ({"decoder_input_ids": X["input_ids"]} if family == "t5" else {})
        plain = model(**inputs).logits
        tasks = [bank.names[0], None, bank.names[1], None]
        expected = model(**inputs, task_ids=tasks).logits
        model.set_attn_implementation("eager")
        told = model.get_decoder().config._attn_implementation == "eager"  # transformers 5.17 does not tell T5's stacks
        refused = pytest.raises(pa.UnsupportedModel, match="switched to attn_implementation='eager' after it was pat")
        with refused if told else nullcontext():
            torch.testing.assert_close(model(**inputs, task_ids=tasks).logits, expected)
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-4, atol=1e-4)
        pa.patch(model, bank)
        torch.testing.assert_close(model(**inputs, task_ids=tasks).logits, expected, rtol=1e-4, atol=1e-4)
        pa.unpatch(model)
        assert model.config._attn_implementation == "eager"

    def test_what_is_changed_meanwhile_stays(self, tmp_path: Path) -> None:
        model = patched("llama")
        model.resize_token_embeddings(120)
        model.config.use_cache = False
        pa.unpatch(model)
        assert (model.config.vocab_size, model.config.use_cache) == (120, False)
        assert model.config._attn_implementation == "sdpa"
        model.save_pretrained(tmp_path)
        assert type(model).from_pretrained(tmp_path).config.vocab_size == 120

    def test_weights_of_attention_are_refused_by_the_config_too(self) -> None:
        model = tiny_model("llama")
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        with pytest.warns(pa.SlowModel, match="output_attentions"):
            pa.patch(model, make_bank(model))
        assert model(**X, task_ids=TASKS).attentions[0].shape == (4, 4, 8, 12 + 8)

    def test_a_pickled_model_finds_its_attention_in_another_process(self, tmp_path: Path) -> None:
        model = patched("llama")
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
        save_file({"logits": logits(model, task_ids=TASKS)}, tmp_path / "logits.safetensors")
        script = """
import pickle, sys
model = pickle.loads(open(sys.argv[1] + "/model.pkl", "rb").read())  # before anything imports the patch
from safetensors.torch import load_file
from tests.hf.test_hazards import TASKS, logits
assert logits(model, task_ids=TASKS).equal(load_file(sys.argv[1] + "/logits.safetensors")["logits"])
"""
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=ROOT)


def test_pefts_own_generate_does_not_hide_the_tasks() -> None:
    model = tiny_model("llama")
    wrapper = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    bank = make_bank(model)
    pa.patch(model, bank)
    expected = model.generate(**X, **GREEDY, task_ids=TASKS)
    with pytest.raises(pa.UnsupportedModel, match="prepare_inputs_for_generation was replaced"):
        wrapper.generate(**X, **GREEDY, task_ids=TASKS)
    pa.patch(model, bank)
    assert torch.equal(model.generate(**X, **GREEDY, task_ids=TASKS), expected)


@pytest.mark.parametrize("family", ["nemotron", "llama"])
def test_an_interrupted_pass_leaves_no_tasks_behind(family: str) -> None:
    """Nemotron loses keywords: its batch waits in the thread, where llama must not find it either."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = tiny_random_model("nemotron")
    pa.patch(model, random_bank(model))
    follower = model if family == "nemotron" else patched("llama")
    expected = logits(follower, task_ids=["nine"] * 4)
    handle = model.model.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**X, task_ids=TASKS)
    handle.remove()
    assert torch.equal(logits(follower, task_ids=["nine"] * 4), expected)


def test_plans_of_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's plan is of its own ids, also while another makes the latest."""
    bank = make_bank(tiny_model("llama"))
    before, wrong = sys.getswitchinterval(), []

    def ask(ids: torch.Tensor) -> None:
        for _ in range(3000):
            plan = bank.plans(ids)[bank.device]
            if plan.task_ids is not ids:
                wrong.append(plan)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(bank.task_ids([task] * 4),)) for task in bank.names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


class TestMadePrefixes:
    """Latent attention makes keys of what the cache holds, by weights that may change."""

    @pytest.fixture
    def model(self) -> Any:
        torch.manual_seed(0)
        return tiny_random_model("deepseek_v3")

    def test_threads_do_not_share_a_recording(self, model: Any) -> None:
        bank = random_bank(model)
        pa.patch(model, bank)
        expected, done = logits(model, task_ids=["nine"] * 4), threading.Event()

        def others() -> None:
            while not done.is_set():
                logits(model)

        thread = threading.Thread(target=others)
        thread.start()
        try:
            for i in range(15):
                bank.add(f"x{i}", [(k.clone(), v.clone()) for k, v in bank.key_values("nine")])
                for _ in range(2):
                    torch.testing.assert_close(logits(model, task_ids=["nine"] * 4), expected)
        finally:
            done.set()
            thread.join()

    def test_they_follow_the_active_adapter(self, model: Any) -> None:
        config = peft.LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False)
        wrapper = peft.get_peft_model(model, config)
        wrapper.add_adapter("second", config)
        wrapper.eval()
        bank = random_bank(wrapper)
        pa.patch(wrapper, bank)
        found = {}
        for adapter in ("default", "second", "default"):
            wrapper.set_adapter(adapter)
            found[adapter] = logits(wrapper, task_ids=["nine"] * 4)
        for adapter, before in found.items():
            wrapper.set_adapter(adapter)
            pa.patch(wrapper, bank)
            torch.testing.assert_close(logits(wrapper, task_ids=["nine"] * 4), before)
        with pytest.raises(pa.UnsupportedModel, match="adapter_names"):
            logits(wrapper, task_ids=["nine"] * 4, adapter_names=["default", "second"] * 2)

    def test_they_follow_an_adapter_that_is_swapped(self, model: Any, tmp_path: Path) -> None:
        config = peft.LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False)
        wrapper = peft.get_peft_model(model, config).eval()
        wrapper.save_pretrained(tmp_path)
        expected = logits(pa.patch(wrapper, random_bank(wrapper)), task_ids=["nine"] * 4)
        with torch.no_grad():
            for name, x in wrapper.named_parameters():
                if "lora_" in name:
                    x.data.mul_(2)  # which PyTorch does not count
        assert not torch.allclose(logits(wrapper, task_ids=["nine"] * 4), expected)
        hotswap_adapter(wrapper, tmp_path, "default")
        torch.testing.assert_close(logits(wrapper, task_ids=["nine"] * 4), expected)

    def test_gradients_equal_those_of_a_replica(self, model: Any) -> None:
        bank, ids = random_bank(model), X["input_ids"][:1]

        def gradients(**options: Any) -> dict[str, torch.Tensor]:
            model.zero_grad()
            model(ids, **options).logits.square().sum().backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        m = bank.prefix_len("nine")
        cache = DynamicCache(config=model.config)
        fill(cache, [bank.key_values("nine")])
        mask, positions = torch.ones(1, m + 8, dtype=torch.long), torch.arange(m, m + 8)[None]
        expected = gradients(past_key_values=cache, attention_mask=mask, position_ids=positions)
        pa.patch(model, bank)
        logits(model, task_ids=["nine"] * 4)  # without gradients: what is kept of it must not serve the next
        found = gradients(task_ids=["nine"], use_cache=False)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)

    def test_a_first_call_in_another_mode_spoils_nothing(self, model: Any) -> None:
        bank = random_bank(model)
        pa.patch(model, bank)
        expected = logits(model, task_ids=["nine"] * 4)
        for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
            pa.patch(model, bank)
            with mode:
                logits(model, task_ids=["nine"] * 4)
            assert torch.equal(logits(model, task_ids=["nine"] * 4), expected)
        model(**X, task_ids=["nine"] * 4).logits.sum().backward()


def test_checkpointing_of_layers_that_are_called_in_turns_is_refused() -> None:
    model = tiny_random_model("hrm_text")
    pa.patch(model, random_bank(model))
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    loss = model(**X, labels=X["input_ids"], use_cache=False, task_ids=TASKS).loss
    with pytest.raises(pa.UnsupportedModel, match="turn it off"):
        loss.backward()


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_padding_that_fills_a_window_is_warned_of(family: str) -> None:
    model = tiny_model(family)
    bank = make_bank(model)
    window = bank.sliding_window
    assert window is not None
    pa.patch(model, bank)
    short = padded_inputs(length=3, paddings=(0, 1))
    long = padded_inputs(length=window.tokens, paddings=(0, 3))
    with pytest.warns(pa.PaddingInWindow, match="row 1: its 3 tokens of padding count in sliding windows"):
        model.generate(**long, **GREEDY, task_ids=["nine", "five"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**long, **GREEDY, task_ids=["nine", None])  # no padding, or no prefix
        model.generate(**short, max_new_tokens=1, task_ids=["nine", "five"])  # room for all


def test_an_assistant_that_transformers_calls_itself() -> None:
    """Drafts of speculative decoding by blocks; the assistant's class tells transformers how to draft."""

    class Drafter:
        def __call__(self, value: int) -> int:
            return value + 1

    wrapped = Assistant(Drafter(), ["nine"])
    assert wrapped(1) == 2
    assert wrapped.__class__.__name__ == "Drafter"


def test_models_made_from_a_patched_ones_config() -> None:
    model = patched("llama")
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    with pytest.raises(PrefixAttnError, match=r"from a patched one's config, call set_attn_implementation\('sdpa'\)"):
        other(X["input_ids"])
    with pytest.raises(pa.UnsupportedModel, match=r"a patched model's config; call set_attn_implementation\('sdpa'\)"):
        pa.patch(other, bank_of(model))
    other.set_attn_implementation("sdpa")
    pa.patch(other, make_bank(other))
    for tasks in ({}, {"task_ids": TASKS}):
        with pytest.raises(pa.UnsupportedModel, match="use_mtp: its drafting layers"):
            model.generate(**X, **tasks, **GREEDY, use_mtp=True)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # transformers gives it
def test_flex_attention_stays_what_a_pass_without_tasks_uses() -> None:
    model = tiny_model("llama")
    expected = logits(model)
    model.set_attn_implementation("flex_attention")
    pa.patch(model, make_bank(model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model, task_ids=TASKS), logits(patched("llama"), task_ids=TASKS))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])  # the fast way, and the slow one
def test_a_wrapper_that_hides_the_arguments_of_forward(family: str) -> None:
    model = tiny_random_model(family)
    with pytest.warns(pa.SlowModel) if family == "gpt_neo" else nullcontext():
        pa.patch(model, make_bank(model))
    expected = logits(model, task_ids=TASKS)
    for module in (model, model.base_model):

        def timed(*args: Any, forward: Any = module.forward, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        module.forward = timed
    assert torch.equal(logits(model, task_ids=TASKS), expected)
