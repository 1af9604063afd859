"""Models and banks shared by the tests of the patch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import prefix_attn as pa
from tests.hf.families import random_prefix, tiny_model
from tests.hf.peft_names import teach_peft_the_new_name

teach_peft_the_new_name()

LENGTHS = {"five": 5, "nine": 9, "twelve": 12}
TASKS = ["five", "twelve", None, "nine"]


def make_bank(model: Any) -> pa.PrefixBank:
    """A bank with three random tasks of different lengths."""
    bank = pa.PrefixBank.for_model(model)
    for seed, (name, m) in enumerate(LENGTHS.items()):
        bank.add(name, random_prefix(model, m, seed))
    return bank


def padded_inputs(length: int = 8, paddings: tuple[int, ...] = (0, 3, 1, 5), seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, left-padded by a different amount in each row."""
    ids = torch.randint(3, 99, (len(paddings), length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, padding in enumerate(paddings):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def replica(model: Any, bank: pa.PrefixBank, task: str | None) -> dict[str, Any]:
    """What to call a patched model with, instead of ``task_ids``, so that a plain cache holds the task's prefix.

    For one row of 8 tokens without padding: the slow way whose meaning nobody doubts.
    """
    cache, m = DynamicCache(config=model.config), 0 if task is None else bank.prefix_len(task)
    for i in range(bank.num_layers if m else 0):
        layer = bank.layer(i)
        start, _ = layer.spans[int(bank.task_ids([task]))]
        cache.update(layer.k[None, :, start : start + m], layer.v[None, :, start : start + m], i)
    mask = torch.ones(1, m + 8, dtype=torch.long)
    return {"past_key_values": cache, "attention_mask": mask, "position_ids": torch.arange(m, m + 8)[None]}


@pytest.fixture(params=["llama", "gemma3_text", "gpt2", "gpt_oss"])
def patched(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A patched tiny model of a family with RoPE, with sliding layers, with learned positions, with sinks."""
    model = tiny_model(request.param)
    pa.patch(model, make_bank(model), verify=True)
    yield model
    pa.unpatch(model)
