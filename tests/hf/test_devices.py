"""Models spread over two devices by accelerate, as ``device_map="auto"`` spreads them: the bits of one device.

The devices are those of tests/devices.py, which refuse to mix; tests/gpu has the same on two GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

import prefix_attn as pa
from tests.devices import MISSING, TYPE, accelerators
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import tiny_model
from tests.hf.shrink import tiny_random_model
from tests.hf.spread import spread
from tests.hf.survey import random_bank
from tests.hf.test_seq2seq import ROWS, decoder_tokens, make_inputs
from tests.hf.test_seq2seq import make_bank as make_seq2seq_bank
from tests.seq2seq import tiny_seq2seq

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

FIRST, SECOND = f"{TYPE}:0", f"{TYPE}:1"
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def two_devices() -> Iterator[None]:
    with accelerators():
        yield


def there(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(FIRST) for name, x in inputs.items()}


def outputs(model: Any, inputs: dict[str, Tensor], **extra: Tensor) -> list[Tensor]:
    """On the CPU: logits, and the tokens of each way to generate."""
    tasks = TASKS if len(inputs["input_ids"]) == len(TASKS) else ROWS
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}]
    with torch.no_grad():
        made = [model(**inputs, **extra, task_ids=tasks).logits, model(**inputs, **extra).logits]
    made += [model.generate(**inputs, **GREEDY, **way, task_ids=tasks) for way in ways]
    return [x.to("cpu") for x in made]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
def test_a_decoder_on_two_devices(family: str) -> None:
    """Rotary, sliding layers, learned positions in two ways."""
    options = {"pad_token_id": None} if family == "gpt2" else {}  # it would look for the token in a way of its own
    model = tiny_model(family, **options).to(FIRST)
    expected = outputs(pa.patch(model, make_bank(model)), there(padded_inputs()))
    model = spread(tiny_model(family, **options), FIRST, SECOND)
    bank = make_bank(model)
    assert [str(bank.layer(i).k.device) for i in range(2)] == [FIRST, SECOND]
    assert [str(bank.layer(i).lens.device) for i in range(2)] == [FIRST, SECOND]
    pa.patch(model, bank, verify=True)
    for ours, theirs in zip(outputs(model, there(padded_inputs())), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")  # BART's last bias
@pytest.mark.parametrize("family", ["t5", "umt5", "bart"])
def test_an_encoder_decoder_on_two_devices(family: str) -> None:
    """Layers of both stacks on both devices; T5's table of biases is on the first, umt5 has one in every layer."""
    model = tiny_seq2seq(family).to(FIRST)
    tokens = there({"decoder_input_ids": decoder_tokens()})
    expected = outputs(pa.patch(model, make_seq2seq_bank(model)), there(make_inputs(model)), **tokens)
    model = spread(tiny_seq2seq(family), FIRST, SECOND)
    bank = make_seq2seq_bank(model)
    for part in bank.parts:
        assert [str(bank.layer(i, part).k.device) for i in range(2)] == [FIRST, SECOND]
    pa.patch(model, bank, verify=True)
    for ours, theirs in zip(outputs(model, there(make_inputs(model)), **tokens), expected, strict=True):
        assert torch.equal(ours, theirs)


class NoStream:
    """A stream of a device that does one thing after another."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, other: NoStream) -> None: ...


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_offloaded_caches(family: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own keys wait on the CPU between the passes of their layer; here without streams, in tests/gpu with them."""
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", NoStream)
    offloaded: list[Any] = []
    offload = CacheLayerMixin.offload
    monkeypatch.setattr(CacheLayerMixin, "offload", lambda layer: offloaded.append(layer) or offload(layer))
    model, inputs = tiny_model(family).to(FIRST), there(padded_inputs())
    pa.patch(model, make_bank(model))
    for way in ({}, {"num_beams": 2}):
        expected = model.generate(**inputs, **GREEDY, **way, task_ids=TASKS)
        got = model.generate(**inputs, **GREEDY, **way, task_ids=TASKS, cache_implementation=implementation)
        assert torch.equal(got, expected)
    assert "cpu" in {layer.keys.device.type for layer in offloaded}, "none but the next layer's keys are fetched back"


def test_prefixes_that_the_model_makes_of_the_banks() -> None:
    """MLA: attention reads keys that each layer makes, on its device, of what the bank keeps."""
    made = []
    for model in (tiny_random_model("deepseek_v3").to(FIRST), spread(tiny_random_model("deepseek_v3"), FIRST, SECOND)):
        pa.patch(model, random_bank(model), verify=True)
        made.append(model.generate(**there(padded_inputs()), **GREEDY, task_ids=TASKS).to("cpu"))
    assert torch.equal(*made)


def test_the_slow_way_on_two_devices() -> None:
    """Copies of the prefix in the cache of each layer."""
    made = []
    for model in (
        tiny_random_model("gpt_neox_japanese").to(FIRST),
        spread(tiny_random_model("gpt_neox_japanese"), FIRST, SECOND),
    ):
        with pytest.warns(pa.SlowModel):
            pa.patch(model, random_bank(model))
        made.append(model.generate(**there(padded_inputs()), **GREEDY, task_ids=TASKS).to("cpu"))
    assert torch.equal(*made)


def test_banks_of_other_placements_are_refused() -> None:
    whole, model = tiny_model("llama").to(FIRST), spread(tiny_model("llama"), FIRST, SECOND)
    with pytest.raises(
        pa.IncompatiblePrefix, match="decoder: 1 layers on privateuseone:0, 1 layers on privateuseone:1"
    ):
        pa.patch(model, make_bank(whole))
    assert "1 layers on privateuseone:1" in repr(make_bank(model))


def test_a_bank_is_saved_and_changed_on_two_devices(tmp_path: Path) -> None:
    """From a file, and with room reserved, where every table is written in place on its device."""
    make_bank(tiny_model("llama")).save_pretrained(tmp_path)
    model = spread(tiny_model("llama"), FIRST, SECOND)
    bank = make_bank(model)
    tokens = there(padded_inputs())
    expected = pa.patch(model, bank).generate(**tokens, **GREEDY, task_ids=TASKS)
    opened = pa.PrefixBank.from_pretrained(tmp_path, model)
    reserved = pa.PrefixBank.for_model(model, reserve=(5, 80))
    held = [reserved.layer(i) for i in range(2)]
    reserved.add("first", bank.key_values("nine"))
    reserved.remove("first")
    for name in bank.names:
        reserved.add(name, bank.key_values(name))
    assert [layer.lens.tolist() for layer in held] == [[-1, 5, 9, 12, -1]] * 2
    for other in (opened, reserved):
        assert torch.equal(pa.patch(model, other).generate(**tokens, **GREEDY, task_ids=TASKS), expected)


def test_continuous_batching_is_refused() -> None:
    model = spread(tiny_model("llama"), FIRST, SECOND)
    pa.patch(model, make_bank(model))
    with pytest.raises(pa.UnsupportedModel, match="on one device"):
        model.generate_batch([[3, 4, 5]], task_ids=["nine"])
