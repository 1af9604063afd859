"""The shipped example, patched, and an engine for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefix_attn as pa
from prefix_attn.cli.example import ShippedExample
from prefix_attn.serving import Engine

EXAMPLE = ShippedExample.found()

# An engine that stops collects garbage twice, which takes a second over all that was imported and stays.
gc.collect()
gc.freeze()


class Served(NamedTuple):
    """A patched model with its bank and its tokenizer."""

    model: Any
    bank: pa.PrefixBank
    tokenizer: Any

    def alone(self, prompt: str, task: str | None, **options: Any) -> str:
        """What ``generate`` answers to one prompt."""
        tokens = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        given = {} if task is None else {"task_ids": [task]}
        out = self.model.generate(tokens, **{"max_new_tokens": 16} | given | options)[0, tokens.shape[1] :]
        text: str = self.tokenizer.decode(out, skip_special_tokens=True)
        return text


@pytest.fixture
def served() -> Served:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE.model)
    bank = pa.PrefixBank.for_model(model)
    for task, folder in EXAMPLE.adapters:
        bank.load(task, folder)
    return Served(pa.patch(model, bank), bank, AutoTokenizer.from_pretrained(EXAMPLE.model))


@pytest.fixture
def engine(served: Served) -> Iterator[Engine]:
    torch.manual_seed(0)
    with Engine(served.model, cache_tokens=1024) as engine:
        yield engine
