"""How tokens are chosen: each row of a batch in its own way."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import prefix_attn as pa
from prefix_attn.serving.sampling import PROCESSORS, Sampling


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -0.1}, r"temperature: expected 0 \(greedy\) or a finite number of at least 0.001, got -0.1"),
        ({"temperature": 1e-30}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p: expected a number above 0, at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_k": -1}, "top_k: expected an integer from 0 to 2147483647, got -1"),
    ],
)
def test_what_is_out_of_range(given: dict[str, Any], words: str) -> None:
    with pytest.raises(pa.ShapeError, match=words):
        Sampling(**given)


def test_the_defaults_are_those_of_generate() -> None:
    assert Sampling.of(GenerationConfig(temperature=0.5)) == Sampling(0, 1, 0), "greedy, for it does not sample"
    assert Sampling.of(GenerationConfig(do_sample=True)) == Sampling(1, 1, 50)
    assert Sampling.of(GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)) == Sampling(
        0.6, 0.95, 20
    )
    assert Sampling(0.6, 0.95, 20).but(temperature=1.0, top_p=None) == Sampling(1, 0.95, 20)


def test_arguments_are_those_that_change_something() -> None:
    assert Sampling(0.7).arguments() == {"temperature": 0.7}
    assert Sampling(1, 0.5, 20).arguments() == {"top_p": 0.5, "top_k": 20}
    assert Sampling(1).arguments() == {}
    assert Sampling(top_p=0.5, top_k=3).arguments() == {"greedy": 1}, "the rest changes nothing then"


def processed(scores: torch.Tensor, name: str, values: list[float | None]) -> torch.Tensor:
    """A step's scores after one processor; None: the request does not say."""
    states = [SimpleNamespace(logit_processor_kwargs={} if x is None else {name: x}) for x in values]
    processor = PROCESSORS[name]()
    storage = torch.full((9,), 7, dtype=torch.int32)  # longer than the step, as the engine's
    processor.fill_defaults(storage)
    bits = processor.prepare_tensor_args([SimpleNamespace(state=state) for state in states])
    storage[: len(bits)] = bits
    return processor(scores, storage)


def scores(rows: int, vocabulary: int = 50) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    ("name", "values", "warper"),
    [
        ("temperature", [0.5, 2.0], TemperatureLogitsWarper),
        ("top_k", [1, 3, 49, 50, 60], lambda k: TopKLogitsWarper(min(k, 50))),
        ("top_p", [0.01, 0.3, 0.9, 0.999], TopPLogitsWarper),
    ],
)
def test_each_row_is_what_generate_makes_of_it(name: str, values: list[float], warper: Callable[[Any], Any]) -> None:
    """And a row that asks for nothing, or for what changes nothing, stays as it is."""
    nothing = [None, PROCESSORS[name].default]
    given = scores(len(values) + 2)
    got = processed(given, name, [*values, *nothing])
    for row, value in enumerate(values):
        torch.testing.assert_close(got[row : row + 1], warper(value)(None, given[row : row + 1]))
    assert torch.equal(got[-2:], given[-2:])


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_step_that_asks_for_nothing_costs_nothing(name: str) -> None:
    given = scores(3)
    assert processed(given, name, [None, None, PROCESSORS[name].default]) is given


def test_greedy_leaves_the_first_of_equals() -> None:
    given = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    none = float("-inf")
    expected = [[none, 3.0, none], [1.0, 3.0, 3.0], [2.0, none, none]]
    assert processed(given, "greedy", [1, None, 1]).tolist() == expected
