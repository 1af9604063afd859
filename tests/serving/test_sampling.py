"""How tokens are chosen: each row of a batch in its own way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import prefix_attn as pa
from prefix_attn.serving.sampling import Greedy, Sampling


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -0.1}, "temperature: expected a finite number, at least 0, got -0.1"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p: expected a number above 0, at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k: expected an integer, at least 0, got -1"),
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


def test_arguments_keep_all_tokens_unless_told_otherwise() -> None:
    assert Sampling(0.7).arguments(99) == {"greedy": False, "temperature": 0.7, "top_k": 99, "top_p": 1.0}
    assert Sampling(1, 0.5, 200).arguments(99)["top_k"] == 99, "no more than there are"
    assert Sampling(top_p=0.5, top_k=3).arguments(99) == {"greedy": True, "temperature": 1.0, "top_k": 99, "top_p": 1.0}


def test_greedy_leaves_the_first_of_equals() -> None:
    futures = [
        SimpleNamespace(state=SimpleNamespace(logit_processor_kwargs={"greedy": x})) for x in (True, False, True)
    ]
    scores = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    left = Greedy()(scores, Greedy().prepare_tensor_args(futures))
    none = float("-inf")
    assert left.tolist() == [[none, 3.0, none], [1.0, 3.0, 3.0], [2.0, none, none]]
