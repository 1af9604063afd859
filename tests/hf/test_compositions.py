"""Prefixes together with what else is done to a model: LoRA, quantised weights, offloaded layers."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, VeraConfig, get_peft_model
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

import prefix_attn as pa
from prefix_attn.hf.patching import layers_read_the_bank
from prefix_attn.hf.sources import fill
from prefix_attn.hf.verify import check_close
from tests.hf.conftest import TASKS, make_bank, padded_inputs, replica
from tests.hf.families import tiny_model
from tests.hf.seq2seq_replica import replicated
from tests.hf.shrink import tiny_random_model
from tests.hf.survey import random_bank
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


KEYS = {"target_modules": ["kv_b_proj"]}
#: Adapters of what makes keys of the bank's latent ones, each in a way of its own.
OF_KEYS = {
    "lora": lambda: LoraConfig(r=4, init_lora_weights=False, **KEYS),
    "ia3": lambda: IA3Config(feedforward_modules=[], init_ia3_weights=False, **KEYS),
    "vera": lambda: VeraConfig(r=4, save_projection=False, **KEYS),
    "modules_to_save": lambda: LoraConfig(r=4, target_modules=["lm_head"], modules_to_save=["kv_b_proj"]),
}


def check_derived(wrapper: Any, bank: pa.PrefixBank) -> None:
    """With the weights as they are now, what the model makes of a prefix is that of a copy in its cache."""
    ids, m = torch.arange(3, 11)[None], bank.prefix_len("nine")
    cache = DynamicCache(config=wrapper.config)
    fill(cache, [bank.key_values("nine")])
    with torch.no_grad():
        got = wrapper(input_ids=ids, task_ids=["nine"]).logits
        mask, positions = torch.ones(1, m + 8, dtype=torch.long), torch.arange(m, m + 8)[None]
        expected = wrapper(input_ids=ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize("kind", OF_KEYS)
def test_prefixes_that_are_derived_follow_the_adapters(kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_random_model("deepseek_v3"), OF_KEYS[kind]())
    model.add_adapter("second", OF_KEYS[kind]())
    model.eval()
    for name, p in model.named_parameters():
        if "default" in name or "second" in name:
            p.data += 0.3 * torch.randn_like(p)
    bank = random_bank(model)
    pa.patch(model, bank)
    for adapter in ("default", "second", "default"):
        model.set_adapter(adapter)
        check_derived(model, bank)
    with model.disable_adapter():
        check_derived(model, bank)
    if kind == "lora":
        model.merge_adapter(["second"])
        check_derived(model, bank)
    layer = next(module for name, module in model.named_modules() if name.endswith("kv_b_proj"))
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    check_derived(model, bank)


BESIDE = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
BESIDE_PREFIXES = {
    "trainable tokens": ("llama", lambda: LoraConfig(r=4, trainable_token_indices=[3, 4], **BESIDE)),
    "experts": ("mixtral", lambda: LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )),
    "vera": ("llama", lambda: VeraConfig(r=4, **BESIDE)),
    "adalora": ("llama", lambda: AdaLoraConfig(init_r=4, total_step=10, **BESIDE)),
    "saved modules": ("llama", lambda: LoraConfig(r=4, modules_to_save=["lm_head"], **BESIDE)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about what is adapted
@pytest.mark.parametrize("kind", BESIDE_PREFIXES)
def test_adapters_leave_the_fingerprint_as_it_is(kind: str) -> None:
    family, config = BESIDE_PREFIXES[kind]
    model = tiny_model(family)
    bank = make_bank(model)
    inputs = padded_inputs()
    wrapper = pa.patch(get_peft_model(model, config()).eval(), bank)
    assert wrapper(**inputs, task_ids=TASKS).logits.shape[0] == len(TASKS)


def test_a_layer_compiled_in_its_place_keeps_its_fingerprint() -> None:
    model = tiny_model("llama")
    bank = make_bank(model)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    bank.check_model(model)


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_is_compiled_before_it_is_patched(again: bool) -> None:
    inputs, model = padded_inputs(), tiny_model("llama")
    expected = pa.patch(model, make_bank(model))(**inputs, task_ids=TASKS).logits
    torch.compiler.reset()
    if not again:
        pa.unpatch(model)
    model.compile(backend="eager")
    pa.patch(model, make_bank(model))  # a warning of the slow way would be an error
    torch.testing.assert_close(model(**inputs, task_ids=TASKS).logits, expected)


def test_attention_of_a_users_own_class() -> None:
    class Mine(LlamaAttention):
        pass

    inputs, model = padded_inputs(), tiny_model("llama")
    bank = make_bank(model)
    expected = pa.patch(tiny_model("llama"), bank)(**inputs, task_ids=TASKS).logits
    for layer in model.model.layers:
        layer.self_attn.__class__ = Mine
    assert torch.equal(pa.patch(model, bank)(**inputs, task_ids=TASKS).logits, expected)


@pytest.mark.parametrize("way", ["embeddings too", "everything", "a second hook", "cpu_offload"])
def test_other_ways_to_offload(way: str, tmp_path: Path) -> None:
    model, inputs = tiny_model("llama"), padded_inputs()
    bank = make_bank(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = pa.patch(copy.deepcopy(model), bank)(**inputs, task_ids=TASKS).logits
    if way == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk = "disk" if way != "a second hook" else "cpu"
        parts = ("model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        places = dict.fromkeys(parts, "cpu") | {"model.embed_tokens": disk, "model.layers.1": "disk"}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, device_map={"": "disk"} if way == "everything" else places,
            offload_folder=tmp_path / "offloaded",
        )  # fmt: skip
    if way == "a second hook":
        hooks = accelerate.hooks
        hooks.add_hook_to_module(model.model.layers[1].self_attn.q_proj, hooks.ModelHook(), append=True)
    pa.patch(model, bank)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, task_ids=TASKS).logits, expected)


def test_weights_that_are_packed_away_count() -> None:
    """torch.ao's dynamic quantisation keeps them in objects of its own."""
    models = [tiny_model("llama") for _ in range(2)]
    models[1].model.layers[0].self_attn.k_proj.weight.data *= -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        first, second = (torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}) for model in models)
    bank = make_bank(first)
    bank.check_model(first)
    with pytest.raises(pa.IncompatiblePrefix, match="expected the fingerprint"):
        bank.check_model(second)


def test_quantised_models_are_compared_as_closely_as_they_compute() -> None:
    model, logits = tiny_model("llama"), torch.randn(1, 5, 99)
    with pytest.raises(pa.UnsupportedModel, match="logits differ"):
        check_close(model, "task", logits, 1.01 * logits)
    codes = torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    model.model.norm.register_parameter("codes", codes)
    check_close(model, "task", logits, 1.01 * logits)
    with pytest.raises(pa.UnsupportedModel, match="logits differ"):
        check_close(model, "task", logits, -logits)
