"""Copies of a patched model, and threads that share one, for every way in which a pass's tasks reach the layers."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import prefix_attn as pa
from tests.hf.conftest import TASKS, padded_inputs
from tests.hf.shrink import tiny_random_model
from tests.hf.survey import random_bank
from tests.hf.threads import ChangesTheBank, wrong_in_threads

#: As a keyword; with positions in a table; by the thread's scope; as prefixes made of the bank's; as copies in a cache.
FAMILIES = ("llama", "opt", "nemotron", "deepseek_v3", "gpt_neox_japanese")


@pytest.fixture(params=FAMILIES)
def patched(request: pytest.FixtureRequest) -> Any:
    model = tiny_random_model(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pa.SlowModel)
        return pa.patch(model, random_bank(model))


def generate(model: Any, tasks: list[str | None] | None = TASKS) -> Tensor:
    options: dict[str, Any] = {} if tasks is None else {"task_ids": tasks}
    tokens: Tensor = model.generate(**padded_inputs(), max_new_tokens=6, do_sample=False, **options)
    return tokens


def test_copies_work_on_their_own(patched: Any) -> None:
    expected = generate(patched)
    for twin in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert torch.equal(generate(twin), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(generate(patched), expected)
        pa.unpatch(twin)
        assert torch.equal(generate(patched), expected)


def test_two_threads_with_different_tasks(patched: Any) -> None:
    """And a third without any."""
    calls: dict[str, list[str | None] | None] = {"mixed": TASKS, "one": ["nine"] * 4, "none": None}
    wanted = {name: generate(patched, tasks) for name, tasks in calls.items()}
    assert not torch.equal(wanted["one"], wanted["none"])
    assert wrong_in_threads(lambda name: generate(patched, calls[name]), wanted) == []


def test_a_generation_ends_with_the_prefixes_it_began_with(patched: Any) -> None:
    expected, bank = generate(patched), patched._prefix_attn.bank
    inputs = padded_inputs()
    changing = [ChangesTheBank(bank, inputs["input_ids"].shape[1])]
    tokens = patched.generate(**inputs, max_new_tokens=6, do_sample=False, task_ids=TASKS, stopping_criteria=changing)
    assert bank.names == ["twelve", "nine"]
    assert torch.equal(tokens, expected)
    assert bank.lengths == [-1, -1, 12, 60], "nobody holds the old ones any more"
    with pytest.raises(pa.UnknownTask, match="'five'"):
        generate(patched)
