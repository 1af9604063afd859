"""What only came out after several operations in a row."""

from __future__ import annotations

import copy
import random
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

import prefix_attn as pa
from prefix_attn.backends.by_task import readers_of
from prefix_attn.hf.decoder import DecoderPatch
from prefix_attn.hf.sources import fill
from tests.hf.conftest import make_bank
from tests.hf.families import random_prefix, tiny_model
from tests.hf.shrink import tiny_random_model
from tests.hf.survey import random_bank
from tests.serving.engines import needs_engine


@pytest.mark.filterwarnings("ignore::prefix_attn.SlowModel")
def test_rows_of_a_slow_familys_cache_keep_their_tasks() -> None:
    model = tiny_random_model("gpt_neox_japanese")
    pa.patch(model, random_bank(model))
    token = torch.tensor([[7]])

    def follow(cache: Any, tasks: list[str]) -> None:
        with torch.no_grad():
            model(token.expand(len(tasks), 1), past_key_values=cache, task_ids=tasks)

    cache = DynamicCache(config=model.config)
    follow(cache, ["five", "nine"])
    cache.batch_repeat_interleave(2)
    follow(cache, ["five", "five", "nine", "nine"])
    cache.batch_select_indices(torch.tensor([2, 3]))
    with pytest.raises(pa.IncompatiblePrefix, match="were computed with tasks"):
        follow(cache, ["five", "nine"])
    follow(cache, ["nine", "nine"])
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(pa.IncompatiblePrefix, match="were computed with tasks"):
        follow(cache, ["five"])


def test_a_name_that_is_being_replaced_is_always_found() -> None:
    model = tiny_model("llama")
    bank, prefix = make_bank(model), random_prefix(model, 5, 0)
    pa.patch(model, bank)
    over, interval = threading.Event(), sys.getswitchinterval()

    def replace() -> None:
        while not over.is_set():
            bank.add("five", prefix, replace=True)

    thread = threading.Thread(target=replace)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(150):
            model.generate(torch.tensor([[5, 6]]), task_ids=["five"], max_new_tokens=1)
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_an_assistant_may_draft_the_pad_token() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    pa.patch(model, make_bank(model))
    with torch.no_grad():
        model.lm_head.weight[model.config.pad_token_id] *= 3  # so that it is drafted often
    for seed in range(5):
        ids = torch.randint(3, 99, (1, 4), generator=torch.Generator().manual_seed(seed))
        given = {"inputs": ids, "attention_mask": torch.ones_like(ids), "task_ids": ["five"], "max_new_tokens": 12}
        assert torch.equal(model.generate(**given, assistant_model=model), model.generate(**given))


@needs_engine
def test_one_token_prompts_of_several_sequences_join_a_smaller_batch() -> None:
    model = tiny_model("llama")
    pa.patch(model, make_bank(model))
    generation = GenerationConfig(do_sample=True, top_k=1, num_return_sequences=2, eos_token_id=-1, pad_token_id=0)
    engine = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=4)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=engine
    ) as manager:
        for tokens, new in ((5, 2), (3, 8), (1, 4), (1, 4), (1, 4)):
            manager.add_request([9] * tokens, task="five", max_new_tokens=new)
        results = [manager.get_result(timeout=60) for _ in range(10)]
    assert [result.error for result in results] == [None] * 10


def test_what_is_remembered_of_a_batch_does_not_grow_with_the_ids_there_were() -> None:
    prefix = pa.PrefixKV.pack([(torch.randn(2, 3, 8), torch.randn(2, 3, 8))] * 50)
    q = torch.randn(1, 2, 1, 8)
    readers_of.cache_clear()
    for longer in (50, 49, 48):  # the other tasks are not the batch's concern
        lens = prefix.lens.clone()
        lens[longer - 1 :] = -1
        pa.prefix_attention(q, q, q, pa.PrefixKV(prefix.k, prefix.v, prefix.starts, lens), [0], backend="torch")
    assert readers_of.cache_info().currsize == 1


class Walk:
    """A batch on one cache, whose rows are copied, dropped and cropped between passes."""

    def __init__(self, family: str, seed: int) -> None:
        self.random, self.plain = random.Random(seed), tiny_random_model(family)
        self.model = copy.deepcopy(self.plain)
        self.bank = random_bank(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pa.SlowModel)
            pa.patch(self.model, self.bank)
        self.croppable = isinstance(self.model._prefix_attn, DecoderPatch) and self.bank.sliding_window is None
        self.cache = DynamicCache(config=self.model.config)
        self.tasks: list[str | None] = [*self.bank.names, None]
        self.rows: list[list[int]] = [[] for _ in self.tasks]

    def forward(self) -> None:
        """Some tokens more: right for each row, and refused with other tasks."""
        count = self.random.choice((1, 1, 3))
        new = [[self.random.randrange(3, 99) for _ in range(count)] for _ in self.rows]
        with torch.no_grad():
            logits = self.model(torch.tensor(new), past_key_values=self.cache, task_ids=self.tasks).logits
        for row, tokens in enumerate(new):
            self.rows[row] += tokens
            torch.testing.assert_close(logits[row], self.alone(row)[-count:], rtol=1e-4, atol=1e-4)
        others = ["five" if task == "nine" else "nine" for task in self.tasks]
        with pytest.raises(pa.IncompatiblePrefix), torch.no_grad():
            self.model(torch.tensor(new), past_key_values=self.cache, task_ids=others)

    def alone(self, row: int) -> torch.Tensor:
        """Logits of all of a row's tokens from the unpatched model, behind a copy of the prefix."""
        cache, task = DynamicCache(config=self.plain.config), self.tasks[row]
        m = 0 if task is None else self.bank.prefix_len(task)
        if task is not None:
            fill(cache, [self.bank.key_values(task)])
        tokens = torch.tensor([self.rows[row]])
        with torch.no_grad():
            out = self.plain(tokens, past_key_values=cache, position_ids=torch.arange(m, m + tokens.shape[1])[None])
        logits: torch.Tensor = out.logits[0]
        return logits

    def take(self) -> None:
        kept = sorted(self.random.sample(range(len(self.rows)), self.random.randint(1, len(self.rows))))
        self.cache.batch_select_indices(torch.tensor(kept))
        self.rows, self.tasks = [[*self.rows[i]] for i in kept], [self.tasks[i] for i in kept]

    def copy(self) -> None:
        if len(self.rows) <= 4:
            self.cache.batch_repeat_interleave(2)
            self.rows = [[*row] for row in self.rows for _ in range(2)]
            self.tasks = [task for task in self.tasks for _ in range(2)]

    def crop(self) -> None:
        if self.croppable and len(self.rows[0]) > 1:
            self.cache.crop(-1)
            self.rows = [row[:-1] for row in self.rows]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox_japanese"])
@pytest.mark.parametrize("seed", range(5))
def test_walks(family: str, seed: int) -> None:
    walk = Walk(family, seed)
    for _ in range(12):
        walk.forward()
        walk.random.choice((walk.take, walk.copy, walk.crop))()
