"""Continuous batching: the tokens of `generate`, for each request with its own task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

import prefix_attn as pa
from tests.hf.conftest import make_bank
from tests.hf.families import random_prefix, tiny_model
from tests.hf.shrink import CAUSAL, tiny_random_model
from tests.hf.survey import random_bank
from tests.serving.engines import OLD, needs_engine

NEW = 14
TASKS: list[str | None] = ["five", "twelve", None, "nine", "five", "nine"]


def prompts() -> list[list[int]]:
    """Lengths that take one step and several; the last repeats the second, whose first blocks are full."""
    rng = torch.Generator().manual_seed(0)
    made = [torch.randint(3, 99, (n,), generator=rng).tolist() for n in (5, 17, 3, 9, 1)]
    return [*made, made[1]]


def engine(**options: Any) -> dict[str, Any]:
    """A small engine: pages of 4 tokens, 16 tokens a step, so that prompts are prefilled in chunks beside decoding."""
    generation = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0} | options
    return {
        "generation_config": GenerationConfig(**generation),
        "continuous_batching_config": ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=16),
    }


def alone(model: Any, prompt: list[int], task: str | None, **options: Any) -> list[int]:
    given = {} if task is None else {"task_ids": [task]}
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, **given, **options)
    return out[0, len(prompt) :].tolist()


@needs_engine
@pytest.mark.parametrize("family", ["bart", "pegasus", "blenderbot"])
def test_families_that_count_positions_along_the_packed_row_are_refused(family: str) -> None:
    model = tiny_random_model(family, CAUSAL[family])
    pa.patch(model, random_bank(model))
    with pytest.raises(pa.UnsupportedModel, match="counts positions"):
        model.generate_batch(prompts(), task_ids=TASKS, **engine())


@pytest.fixture
def llama() -> Any:
    model = tiny_model("llama")
    return pa.patch(model, make_bank(model))


@needs_engine
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_oss"])
def test_equals_generate(family: str) -> None:
    if family == "opt" and transformers.__version__.startswith("5.24."):
        pytest.skip("the engine of transformers 5.24 fails on opt, patched or not")
    model = tiny_model(family)
    pa.patch(model, make_bank(model))
    out = model.generate_batch(prompts(), task_ids=TASKS, **engine())
    for result, prompt, task in zip(out.values(), prompts(), TASKS, strict=True):
        assert result.error is None
        assert result.generated_tokens == alone(model, prompt, task)


@needs_engine
def test_keys_that_are_gathered(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, or without a compiler."""
    monkeypatch.setattr("prefix_attn.hf.packed.reads_in_place", lambda *_: False)
    out = llama.generate_batch(prompts(), task_ids=TASKS, **engine())
    for result, prompt, task in zip(out.values(), prompts(), TASKS, strict=True):
        assert result.generated_tokens == alone(llama, prompt, task)


@needs_engine
def test_requests_that_cannot_be_served_fail_alone(llama: Any) -> None:
    given = [*prompts(), [5] * 120]
    tasks = ["five", "unknown", None, 7, "five", "nine", "twelve"]
    results = list(llama.generate_batch(given, task_ids=tasks, **engine()).values())
    for i in (0, 2, 4, 5):
        assert results[i].generated_tokens == alone(llama, given[i], tasks[i])  # type: ignore[arg-type]
    assert "'unknown'" in results[1].error
    assert "'nine'" in results[1].error
    assert "got 7" in results[3].error
    assert "prefix of 12 tokens" in results[6].error


@needs_engine
def test_return_sequences_keep_their_task(llama: Any) -> None:
    tasks = ["five", "missing", None, "nine", "five", "nine"]
    out = list(
        llama.generate_batch(
            prompts(), task_ids=tasks, **engine(num_return_sequences=2, do_sample=True, top_k=1)
        ).values()
    )
    assert len(out) == 12
    for i, (prompt, task) in enumerate(zip(prompts(), tasks, strict=True)):
        for result in out[2 * i : 2 * i + 2]:
            if task == "missing":
                assert result.error is not None
            else:
                assert result.generated_tokens == alone(llama, prompt, task)


@needs_engine
def test_a_manager_takes_requests_as_they_come(llama: Any) -> None:
    wanted = {}
    with llama.continuous_batching_context_manager(**engine()) as manager:
        for prompt, task in zip(prompts(), TASKS, strict=True):
            wanted[manager.add_request(prompt, task=task)] = (prompt, task)
        (last,) = manager.add_requests([prompts()[0]], task_ids=["twelve"])
        wanted[last] = (prompts()[0], "twelve")
        with pytest.raises(pa.UnknownTask, match="'six'"):
            manager.add_request([3, 4], task="six")
        with pytest.raises(pa.ShapeError, match="2 in all"):
            manager.add_requests([[3], [4]], task_ids=["five"])
        results = {}
        while len(results) < len(wanted):
            result = manager.get_result(timeout=60)
            results[result.request_id] = result.generated_tokens
    for name, (prompt, task) in wanted.items():
        assert results[name] == alone(llama, prompt, task)
    assert manager._task_of == {}, "finished requests are forgotten"


@needs_engine
def test_the_bank_changes_while_requests_run(llama: Any) -> None:
    """A request ends with the prefix it began with; then that prefix is gone."""
    bank = llama._prefix_attn.bank
    five = alone(llama, prompts()[1], "five")
    with llama.continuous_batching_context_manager(**engine()) as manager:
        running = manager.add_request(prompts()[1], task="five", streaming=True)
        cancelled = manager.add_request(prompts()[1], task="nine", max_new_tokens=100)
        tokens = 0
        while tokens < 3:
            tokens = len(manager.get_result(timeout=60).generated_tokens)
        bank.remove("five")
        bank.add("nine", random_prefix(llama, 40, seed=7), replace=True)
        manager.cancel_request(cancelled)
        with pytest.raises(pa.UnknownTask, match="'five'"):
            manager.add_request(prompts()[0], task="five")
        replaced = manager.add_request(prompts()[0], task="nine")
        results: dict[str, Any] = {}
        while not {running, replaced} <= results.keys():
            result = manager.get_result(timeout=60)
            if result.is_finished():
                results[result.request_id] = result
    assert results[running].generated_tokens == five
    assert results[replaced].generated_tokens == alone(llama, prompts()[0], "nine")
    assert cancelled not in results
    assert bank.lengths == [-1, -1, 12, 40]
    assert manager._task_of == {}


@needs_engine
def test_a_request_that_the_engine_drops_holds_nothing(llama: Any) -> None:
    with llama.continuous_batching_context_manager(**engine(num_return_sequences=2, do_sample=True)) as manager:
        refused = manager.add_request(prompts()[0], task="five", temperature=0.5)
        result = manager.get_result(timeout=60)
    assert result.request_id == refused
    assert "temperature" in result.error
    assert manager.add_request(prompts()[0], task="five") is None, "the engine was stopped"
    assert manager._task_of == {}


@needs_engine
def test_a_name_that_a_running_request_has(llama: Any) -> None:
    with llama.continuous_batching_context_manager(**engine()) as manager:
        manager.add_request(prompts()[0], request_id="mine", task="five")
        with pytest.raises(pa.PrefixAttnError, match="no running request has, got 'mine'"):
            manager.add_request(prompts()[1], request_id="mine", task="nine")
        manager.add_request(prompts()[1], request_id="req_0", task="nine", max_new_tokens=40)
        with pytest.raises(pa.PrefixAttnError, match="got 'req_0'"):  # the name that transformers would give the first
            manager.add_requests([prompts()[2]], task_ids=["five"])
        assert manager.get_result(timeout=60).generated_tokens == alone(llama, prompts()[0], "five")
    assert manager._task_of == {}


@needs_engine
def test_a_name_that_a_running_sequence_has(llama: Any) -> None:
    options = engine(num_return_sequences=2, do_sample=True, top_k=1, max_new_tokens=90, eos_token_id=-1)
    with llama.continuous_batching_context_manager(**options) as manager:
        manager.add_request(prompts()[0], request_id="mine", task="five", streaming=True)
        while "mine__child#0" not in {manager.get_result(timeout=60).request_id}:
            pass
        manager.cancel_request("mine")
        with pytest.raises(pa.PrefixAttnError, match="no running request has, got 'mine'"):
            manager.add_request(prompts()[0], request_id="mine", task="nine")
        while not (result := manager.get_result(timeout=60)).is_finished():
            pass
    assert result.request_id == "mine__child#0"
    assert manager._task_of == {}


@needs_engine
@pytest.mark.parametrize("prompts", [[[5]], [[5], [6, 7]]], ids=["alone", "beside others"])
def test_sequences_of_one_token(llama: Any, prompts: list[list[int]]) -> None:
    """The engine keeps the one token for the sequences themselves, so that its first step has none of it."""
    options = engine(num_return_sequences=2, do_sample=True, top_k=1)
    rows = list(zip(prompts, ["five", "nine"], strict=False))
    out = list(llama.generate_batch(prompts, task_ids=[task for _, task in rows], **options).values())
    for result, (prompt, task) in zip(out, [row for row in rows for _ in range(2)], strict=True):
        assert result.generated_tokens == alone(llama, prompt, task)


@needs_engine
def test_generation_stops_at_the_models_context(llama: Any) -> None:
    """128 positions: a prompt of 100 behind a prefix of 12 has room for 17 new tokens, the last of which is not fed."""
    given = [[5] * 100]
    out = llama.generate_batch(given, task_ids=["twelve"], **engine(max_new_tokens=None, eos_token_id=-1))
    (result,) = out.values()
    assert result.error is None
    assert len(result.generated_tokens) == 17


@needs_engine
def test_without_tasks_and_after_unpatching(llama: Any) -> None:
    patched = [r.generated_tokens for r in llama.generate_batch(prompts(), **engine()).values()]
    with pytest.raises(pa.ShapeError, match="6 in all, got 1"):
        llama.generate_batch(prompts(), task_ids=["five"], **engine())
    pa.unpatch(llama)
    plain = [r.generated_tokens for r in llama.generate_batch(prompts(), **engine()).values()]
    assert patched == plain == [alone(llama, prompt, None) for prompt in prompts()]


@needs_engine
@pytest.mark.parametrize("option", ["use_cuda_graph", "use_async_batching"])
def test_what_would_replay_old_tasks_is_refused(llama: Any, option: str) -> None:
    options = engine()
    setattr(options["continuous_batching_config"], option, True)
    with pytest.raises(pa.UnsupportedModel, match=option):
        llama.generate_batch(prompts(), task_ids=TASKS, **options)


@needs_engine
def test_what_the_engine_would_choose_by_itself_is_off_or_refused(llama: Any) -> None:
    """Intervals of padding switch graphs on where there is a GPU; a model's config may ask for compilation."""
    options = engine()
    options["continuous_batching_config"].q_padding_interval_size = 8
    with llama.continuous_batching_context_manager(**options) as manager:
        assert manager.continuous_batching_config.use_cuda_graph == (False, False)
    llama.config.compile_config = transformers.CompileConfig()
    with pytest.raises(pa.UnsupportedModel, match="varlen_compile_config"):
        llama.generate_batch(prompts(), task_ids=TASKS, **options)


@needs_engine
def test_a_kept_manager_belongs_to_its_bank(llama: Any) -> None:
    options = engine() | {"persistent_manager": True}
    first = llama.generate_batch(prompts(), task_ids=TASKS, **options)
    again = llama.generate_batch(prompts(), task_ids=TASKS, **options)
    assert [r.generated_tokens for r in again.values()] == [r.generated_tokens for r in first.values()]
    bank = pa.PrefixBank.for_model(llama)
    bank.add("other", random_prefix(llama, 4, seed=9))
    pa.patch(llama, bank)
    with pytest.raises(pa.UnsupportedModel, match="destroy"):
        llama.generate_batch(prompts(), task_ids=["other"] * 6, **options)
    llama.destroy_cached_continuous_batching_manager()
    (result,) = llama.generate_batch(prompts()[:1], task_ids=["other"], **engine()).values()
    assert result.generated_tokens == alone(llama, prompts()[0], "other")


@pytest.mark.skipif(not OLD, reason="this transformers has the engine the package was written for")
def test_older_engines_are_refused(llama: Any) -> None:
    with pytest.raises(pa.UnsupportedModel, match=r"5\.23"):
        llama.generate_batch(prompts(), task_ids=TASKS)
