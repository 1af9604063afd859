"""Prefixes together with what else is done to a model: LoRA, quantised weights, offloaded layers."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

import prefix_attn as pa
from prefix_attn.hf.patching import layers_read_the_bank
from tests.hf.conftest import TASKS, make_bank, padded_inputs, replica
from tests.hf.families import tiny_model
from tests.hf.seq2seq_replica import replicated
from tests.hf.test_seq2seq import ROWS, decoder_tokens, make_inputs
from tests.hf.test_seq2seq import TASKS as PART_LENGTHS
from tests.hf.test_seq2seq import make_bank as make_seq2seq_bank
from tests.seq2seq import random_parts, tiny_seq2seq

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
ADAPTERS = ["first", "second", "__base__", "second"]


def with_lora(model: Any) -> Any:
    """A PEFT model with two random LoRA adapters."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    wrapper = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options), "first")
    wrapper.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj", "down_proj"], **options))
    return wrapper.eval()


def unpadded() -> dict[str, torch.Tensor]:
    return padded_inputs(paddings=(0, 0, 0, 0))


def assert_equals_replica(model: Any, bank: pa.PrefixBank, logits: torch.Tensor, row: int, **options: Any) -> None:
    tokens = unpadded()["input_ids"][row : row + 1]
    with torch.no_grad():
        expected = model(tokens, **replica(model, bank, TASKS[row]), **options).logits
    torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_lora_per_row_with_a_prefix_per_row() -> None:
    """Through the wrapper's forward and generate, with an adapter and a task for each row."""
    model = tiny_model("llama")
    bank = make_bank(model)  # made for the base, before it got adapters
    wrapper = with_lora(model)
    assert pa.patch(wrapper, bank) is wrapper
    inputs = unpadded()
    with torch.no_grad():
        mixed = wrapper(**inputs, task_ids=TASKS, adapter_names=ADAPTERS).logits
        inside = model(**inputs, task_ids=TASKS).logits
        assert torch.equal(wrapper(**inputs, task_ids=TASKS).logits, inside)
    tokens = wrapper.generate(**padded_inputs(), **GREEDY, task_ids=TASKS, adapter_names=ADAPTERS)
    for row, adapter in enumerate(ADAPTERS):
        alone = {name: x[row : row + 1] for name, x in padded_inputs().items()}
        if adapter == "__base__":
            with wrapper.disable_adapter():
                assert_equals_replica(model, bank, mixed, row)
                expected = wrapper.generate(**alone, **GREEDY, task_ids=[TASKS[row]])
        else:
            wrapper.set_adapter(adapter)
            assert_equals_replica(model, bank, mixed, row)
            expected = wrapper.generate(**alone, **GREEDY, task_ids=[TASKS[row]])
        assert torch.equal(tokens[row, : expected.shape[1]], expected[0])
    pa.unpatch(wrapper)
    assert not wrapper._forward_pre_hooks
    assert "generate" not in model.__dict__


@pytest.mark.parametrize(("family", "targets"), [("t5", ["q", "v"]), ("bart", ["q_proj", "v_proj"])])
def test_lora_on_an_encoder_decoder(family: str, targets: list[str]) -> None:
    """An adapter and a task for each row, through the wrapper's forward and generate; prefixes in all parts."""
    model = tiny_seq2seq(family)
    bank = make_seq2seq_bank(model)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=targets, task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    wrapper = get_peft_model(model, config, "first").eval()
    pa.patch(wrapper, bank)
    inputs, tokens = make_inputs(model), decoder_tokens()
    adapters = ["first", "__base__"] * 3
    with torch.no_grad():
        logits = wrapper(**inputs, decoder_input_ids=tokens, task_ids=ROWS, adapter_names=adapters).logits
        made = wrapper.generate(**inputs, **GREEDY, task_ids=ROWS, adapter_names=adapters)
        for row, task in enumerate(ROWS):
            parts = {} if task is None else random_parts(bank, PART_LENGTHS[task], list(PART_LENGTHS).index(task))
            alone = {name: x[row : row + 1] for name, x in inputs.items()}
            pa.unpatch(wrapper)
            with wrapper.disable_adapter() if row % 2 else nullcontext(), replicated(model, parts):
                expected = model(**alone, decoder_input_ids=tokens[row : row + 1]).logits[0]
                theirs = model.generate(**alone, **GREEDY)[0]
            pa.patch(wrapper, bank)
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(made[row, : len(theirs)], theirs)


def test_wrappers_that_are_refused() -> None:
    model = tiny_model("llama")
    bank = make_bank(model)
    merged = with_lora(tiny_model("llama"))
    merged.merge_adapter(["first"])
    with pytest.raises(pa.IncompatiblePrefix, match="weights"):
        pa.patch(merged, bank)
    assert not merged._forward_pre_hooks
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(pa.UnsupportedModel, match="bank"):
        pa.patch(get_peft_model(tiny_model("llama"), prefix), bank)


def assert_works(model: Any) -> None:
    """A bank of the model itself, its logits and tokens."""
    bank = make_bank(model)
    pa.patch(model, bank)
    with torch.no_grad():
        logits = model(**unpadded(), task_ids=TASKS).logits
    for row in range(4):
        assert_equals_replica(model, bank, logits, row)
    tokens = model.generate(**padded_inputs(), **GREEDY, task_ids=TASKS)
    for row, task in enumerate(TASKS):
        alone = {name: x[row : row + 1] for name, x in padded_inputs().items()}
        expected = model.generate(**alone, **GREEDY, task_ids=[task])[0]
        assert torch.equal(tokens[row, : len(expected)], expected)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_int8_weights() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_model("llama")
    bank = make_bank(model)
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(pa.IncompatiblePrefix, match="weights"):
        pa.patch(model, bank)
    assert_works(model)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_bitsandbytes_nf4(tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert_works(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, dtype=torch.float32)
    )


@pytest.mark.parametrize("automatic", [False, True])
def test_layers_offloaded_to_disk(automatic: bool, tmp_path: Path) -> None:
    """A device map with a layer on disk, given or found by accelerate for lack of memory: between calls its weights are
    on the meta device."""
    model = tiny_model("llama")
    bank = make_bank(model)
    expected = pa.patch(model, bank).generate(**padded_inputs(), **GREEDY, task_ids=TASKS)
    pa.unpatch(model)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    room = {"cpu": sum(4 * p.numel() for p in model.parameters()) - 1} if automatic else None
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto" if automatic else places, max_memory=room,
        offload_folder=tmp_path / "offload", dtype=torch.float32,
    )  # fmt: skip
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    assert any(p.is_meta for p in offloaded.parameters())
    pa.patch(offloaded, bank, verify=True)
    assert torch.equal(offloaded.generate(**padded_inputs(), **GREEDY, task_ids=TASKS), expected)


def test_an_encoder_decoder_offloaded_to_disk(tmp_path: Path) -> None:
    """Among what is on disk is the table of T5's relative biases."""
    model = tiny_seq2seq("t5")
    bank = make_seq2seq_bank(model)
    expected = pa.patch(model, bank).generate(**make_inputs(model), **GREEDY, task_ids=ROWS)
    pa.unpatch(model)
    model.save_pretrained(tmp_path / "model")
    places = {"shared": "cpu", "lm_head": "cpu"}
    for stack in ("encoder", "decoder"):
        places |= {f"{stack}.{name}": "cpu" for name in ("embed_tokens", "final_layer_norm", "dropout")}
        places[f"{stack}.block"] = "disk"
    offloaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    assert offloaded.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.is_meta
    pa.patch(offloaded, bank)
    assert torch.equal(offloaded.generate(**make_inputs(model), **GREEDY, task_ids=ROWS), expected)


def test_a_model_that_accelerate_lets_compute_in_bfloat16() -> None:
    """Its forward is wrapped in autocast and returns float32 all the same."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny_model("llama"))
    pa.patch(model, make_bank(model), verify=True)  # without a SlowModel warning
    assert layers_read_the_bank(model)
