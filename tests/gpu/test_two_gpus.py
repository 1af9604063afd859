"""A model whose layers are on two GPUs gives the tokens that it gives on one, on the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefix_attn as pa
from tests.gpu.test_patch_on_device import FAMILIES
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import tiny_model
from tests.hf.spread import spread
from tests.hf.test_seq2seq import ROWS, make_inputs
from tests.hf.test_seq2seq import make_bank as make_seq2seq_bank
from tests.seq2seq import tiny_seq2seq

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}

pytestmark = pytest.mark.skipif(COUNT < 2, reason=f"{COUNT} GPUs: tests/hf/test_devices.py simulates two devices")


def check(models: list[Any], make: Any, inputs: dict[str, torch.Tensor], tasks: list[str | None]) -> None:
    """The second model, spread, against the first."""
    inputs = {name: x.to("cuda:0") for name, x in inputs.items()}
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}]
    made = []
    for model in models:
        bank = make(model)
        pa.patch(model, bank, verify=True)
        made.append([model.generate(**inputs, **GREEDY, **way, task_ids=tasks) for way in ways])
    assert [str(bank.layer(i).k.device) for i in range(2)] == ["cuda:0", "cuda:1"]
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder(family: str) -> None:
    models = [tiny_model(family, **FAMILIES[family]) for _ in range(2)]
    check([models[0].to("cuda:0"), spread(models[1], 0, 1)], make_bank, padded_inputs(), TASKS)


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder(family: str) -> None:
    models = [tiny_seq2seq(family) for _ in range(2)]
    check([models[0].to("cuda:0"), spread(models[1], 0, 1)], make_seq2seq_bank, make_inputs(models[0]), ROWS)
