"""Every family against PEFT, row by row: left padding, greedy with logits, beams and return sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import prefix_attn as pa
from tests.hf.conftest import LENGTHS, TASKS, padded_inputs
from tests.hf.families import FAMILIES, tiny_model
from tests.hf.peft_oracle import PeftOracle

TOLERANCE = 1e-5


class Pair(NamedTuple):
    model: Any
    peft: PeftOracle


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A patched model whose bank was loaded from the adapters PEFT saved, and PEFT with the same adapters."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    peft = PeftOracle(request.param, folder, LENGTHS)
    model = tiny_model(request.param)
    bank = pa.PrefixBank.for_model(model)
    for name, path in peft.paths.items():
        bank.load(name, path)
    return Pair(pa.patch(model, bank, verify=True), peft)


def one_row(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {name: x[row : row + 1] for name, x in inputs.items()}


def test_greedy_with_logits(pair: Pair) -> None:
    inputs, options = padded_inputs(), {"max_new_tokens": 12, "do_sample": False}
    ours = pair.model.generate(**inputs, **options, task_ids=TASKS, output_logits=True, return_dict_in_generate=True)
    for row, task in enumerate(TASKS):
        theirs = pair.peft.generate(task, **one_row(inputs, row), **options)
        new = theirs.sequences[0, 8:]
        assert torch.equal(ours.sequences[row, 8 : 8 + len(new)], new)
        for step, logits in enumerate(theirs.logits):
            assert (ours.logits[step][row] - logits[0]).abs().max() < TOLERANCE


def test_beams_and_return_sequences(pair: Pair) -> None:
    inputs = padded_inputs()
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    ours = pair.model.generate(**inputs, **options, task_ids=TASKS)
    for row, task in enumerate(TASKS):
        theirs = pair.peft.generate(task, **one_row(inputs, row), **options).sequences
        assert torch.equal(ours[2 * row : 2 * row + 2, : theirs.shape[1]], theirs)


def test_forward(pair: Pair) -> None:
    inputs = padded_inputs()
    with torch.no_grad():
        ours = pair.model(**inputs, task_ids=TASKS).logits
    for row, task in enumerate(TASKS):
        theirs = pair.peft.logits(task, **one_row(inputs, row))
        real = inputs["attention_mask"][row].bool()
        assert (ours[row] - theirs[0])[real].abs().max() < TOLERANCE


def test_sampling_draws_the_same_tokens(pair: Pair) -> None:
    inputs = {"input_ids": padded_inputs(paddings=(0, 0, 0))["input_ids"]}
    options = {"max_new_tokens": 10, "do_sample": True, "top_k": 0}
    torch.manual_seed(1)
    ours = pair.model.generate(**inputs, **options, task_ids=["nine"] * 3)
    torch.manual_seed(1)
    assert torch.equal(ours, pair.peft.generate("nine", **inputs, **options).sequences)


def test_sliding_windows_forget_the_prefix_alike(pair: Pair) -> None:
    """Long enough for the window of 12 to leave the prefix, then the first tokens, behind."""
    inputs, options = padded_inputs(length=20), {"max_new_tokens": 30, "do_sample": False}
    ours = pair.model.generate(**inputs, **options, task_ids=TASKS)
    for row, task in enumerate(TASKS):
        theirs = pair.peft.generate(task, **one_row(inputs, row), **options).sequences[0, 20:]
        assert torch.equal(ours[row, 20 : 20 + len(theirs)], theirs)
