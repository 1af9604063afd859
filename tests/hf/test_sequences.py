"""What only came out after several operations in a row."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

import prefix_attn as pa
from prefix_attn.backends.by_task import readers_of
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
