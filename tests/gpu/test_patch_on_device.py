"""The patch on a GPU, where the kernels are chosen by themselves: tiny models in float32, against the CPU and alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import prefix_attn as pa
from prefix_attn.backends import triton as backend
from prefix_attn.training import TrainablePrefixes
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import tiny_model
from tests.hf.threads import ChangesTheBank
from tests.serving.engines import needs_engine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = {"max_new_tokens": 10, "do_sample": False}

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: the patch is tested on the CPU in tests/hf")

#: Heads of 16, the smallest the kernels take: rotary, sliding layers, learned positions without grouped heads.
FAMILIES: dict[str, dict[str, int]] = {"llama": {"hidden_size": 64}, "gemma3_text": {}, "gpt2": {"n_embd": 64}}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry for each call that the Triton backend runs."""
    calls: list[int] = []
    forward = backend.forward

    def counted(call: Any) -> Any:
        calls.append(call.q_len)
        return forward(call)

    monkeypatch.setattr(backend, "forward", counted)
    return calls


@pytest.fixture
def model(family: str) -> Iterator[Any]:
    """Patched on the device, its logits compared there with a prefix replicated in a plain cache."""
    model = tiny_model(family, **FAMILIES[family]).to(DEVICE)
    yield pa.patch(model, make_bank(model), verify=True)
    pa.unpatch(model)


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def test_generates_what_the_cpu_generates(model: Any, family: str, kernel_calls: list[int]) -> None:
    """On the CPU the patch is proven equal to PEFT."""
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    got = model.generate(**on_device(padded_inputs()), **options, task_ids=TASKS)
    assert 1 in kernel_calls, "decode did not use the kernels"
    assert max(kernel_calls) > 1, "prefill did not use the kernels"
    on_cpu = tiny_model(family, **FAMILIES[family])
    expected = pa.patch(on_cpu, make_bank(on_cpu)).generate(**padded_inputs(), **options, task_ids=TASKS)
    assert torch.equal(got.sequences.cpu(), expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)


def test_a_mixed_batch_gives_each_row_what_it_gets_alone(model: Any) -> None:
    inputs = on_device(padded_inputs())
    mixed = model.generate(**inputs, **GREEDY, task_ids=TASKS)
    for row, task in enumerate(TASKS):
        one = {name: x[row : row + 1] for name, x in inputs.items()}
        alone = model.generate(**one, **GREEDY, task_ids=[task])
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0])


def test_prefixes_learn_what_they_learn_on_the_cpu(family: str, kernel_calls: list[int]) -> None:
    """There a mixed batch has PEFT's gradients."""
    gradients = []
    inputs = {name: x[:, :6] for name, x in padded_inputs(paddings=(0, 0, 0, 0)).items()}
    for device in ("cpu", DEVICE):
        model = tiny_model(family, **FAMILIES[family]).to(device)
        bank = make_bank(model)
        prefixes = TrainablePrefixes(model, {name: bank.key_values(name) for name in bank.names}, projection=None)
        with prefixes.attached(model):
            given = {name: x.to(device) for name, x in inputs.items()}
            model(**given, task_ids=TASKS, use_cache=False).logits.square().mean().backward()
        gradients.append([prefixes.parameters_of(name)[0].grad.cpu() for name in bank.names])
    assert kernel_calls, "training did not use the kernels"
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=float(1e-3 * theirs.abs().max()))


@needs_engine
def test_continuous_batching(model: Any, kernel_calls: list[int]) -> None:
    """Prompts of several lengths in one step beside requests that decode; the graphs of the engine stay off."""
    prompts = [[5, 6, 7], [9] * 40, [3], [8, 4]]
    out = model.generate_batch(
        prompts, task_ids=TASKS, generation_config=GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=32),
    )  # fmt: skip
    assert 1 in kernel_calls
    for result, prompt, task in zip(out.values(), prompts, TASKS, strict=True):
        alone = model.generate(torch.tensor([prompt], device=DEVICE), **GREEDY, eos_token_id=None, task_ids=[task])
        assert result.error is None
        assert result.generated_tokens == alone[0, len(prompt) :].tolist()


def test_a_generation_ends_with_the_prefixes_it_began_with(model: Any) -> None:
    """Also where another thread removes them: on a GPU a row without its prefix would be NaN."""
    inputs, bank = on_device(padded_inputs()), model._prefix_attn.bank
    expected = model.generate(**inputs, **GREEDY, task_ids=TASKS)
    changes = [ChangesTheBank(bank, inputs["input_ids"].shape[1])]
    assert torch.equal(model.generate(**inputs, **GREEDY, task_ids=TASKS, stopping_criteria=changes), expected)
    assert "five" not in bank


def test_static_cache(model: Any, kernel_calls: list[int]) -> None:
    inputs = on_device(padded_inputs())
    expected = model.generate(**inputs, **GREEDY, task_ids=TASKS)
    kernel_calls.clear()
    static = GREEDY | {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**inputs, **static, task_ids=TASKS), expected)
    assert 1 in kernel_calls


def test_static_cache_compiled() -> None:
    """What transformers does with a static cache on a GPU unless told otherwise: it compiles decode."""
    model = tiny_model("llama", **FAMILIES["llama"]).to(DEVICE)
    pa.patch(model, make_bank(model))
    inputs = on_device(padded_inputs())
    expected = model.generate(**inputs, **GREEDY, task_ids=TASKS)
    got = model.generate(**inputs, **GREEDY, task_ids=TASKS, cache_implementation="static")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_caches(model: Any, implementation: str) -> None:
    """Own keys wait on the CPU between the passes of their layer."""
    inputs = on_device(padded_inputs())
    for way in ({}, {"num_beams": 2}):
        expected = model.generate(**inputs, **GREEDY, **way, task_ids=TASKS)
        offloaded = GREEDY | way | {"cache_implementation": implementation, "disable_compile": True}
        assert torch.equal(model.generate(**inputs, **offloaded, task_ids=TASKS), expected)
