"""The engine: what ``generate`` answers, for requests of many tasks at once; what would stop it for all is refused."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

import prefix_attn as pa
from prefix_attn.cli.example import ANSWERS, INPUT
from prefix_attn.serving import Engine, EngineFailed, Request, Sampling
from tests.hf.conftest import make_bank
from tests.hf.families import tiny_model
from tests.serving.conftest import Served
from tests.serving.engines import answer, answers, needs_engine, settled

PROMPT = f"{INPUT}>"


@needs_engine
def test_all_tasks_and_none_at_once(served: Served, engine: Engine) -> None:
    tokens = served.tokenizer(PROMPT)["input_ids"]
    made = answers(engine, *(Request(tokens, task) for task in (*ANSWERS, None)))
    texts = [served.tokenizer.decode(out, skip_special_tokens=True) for out, _ in made]
    assert texts[:-1] == list(ANSWERS.values())
    assert texts[-1].startswith(served.alone(PROMPT, None))
    assert {finish for _, finish in made[:-1]} == {"stop"}
    assert (engine.running, engine.waiting, engine.failure) == (0, 0, None)


@needs_engine
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_oss"])
def test_tokens_are_those_of_generate(family: str) -> None:
    model = tiny_model(family)
    pa.patch(model, make_bank(model))
    prompts = [[5, 6, 7], [9] * 20, [3]]
    asked = [Request(prompt, task, 12) for prompt in prompts for task in (None, "five", "twelve")]
    with Engine(model, cache_tokens=2048) as engine:
        made = answers(engine, *asked)
    for request, (tokens, _) in zip(asked, made, strict=True):
        given = {} if request.task is None else {"task_ids": [request.task]}
        out = model.generate(torch.tensor([request.tokens]), max_new_tokens=12, do_sample=False, **given)
        assert tokens == out[0, len(request.tokens) :].tolist()


@needs_engine
def test_rows_choose_in_their_own_way(served: Served, engine: Engine) -> None:
    """Greedy rows beside others, and top_k = 1, which is greedy too where no two tokens are equal."""
    tokens = served.tokenizer(PROMPT)["input_ids"]
    hot = [Request(tokens, "upper", 40, Sampling(temperature=50.0)) for _ in range(4)]
    made = answers(
        engine, Request(tokens, "upper"), *hot, Request(tokens, "upper", sampling=Sampling(1.0, top_k=1)),
        Request(tokens, "upper", sampling=Sampling(1.0, top_p=0.01)),
    )  # fmt: skip
    texts = [served.tokenizer.decode(out, skip_special_tokens=True) for out, _ in made]
    assert texts[0] == texts[5] == texts[6] == ANSWERS["upper"]
    assert len(set(texts[1:5])) > 1


@needs_engine
def test_the_largest_top_k(engine: Engine) -> None:
    made = answers(engine, Request([5], "upper", 2, Sampling(1.0, top_k=2**31 - 1)))
    assert len(made[0][0]) <= 2
    assert engine.failure is None


@needs_engine
def test_a_model_that_samples(served: Served) -> None:
    served.model.generation_config.update(do_sample=True, temperature=0.5, top_k=3)
    engine = Engine(served.model, cache_tokens=256)
    assert engine.defaults == Sampling(0.5, 1.0, 3)


@needs_engine
@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request([]), pa.ShapeError, "at least one token"),
        (Request([5, 99_999]), pa.ShapeError, r"expected tokens of 0 to \d+, got 99999"),
        (Request([-1]), pa.ShapeError, "got -1"),
        (Request([5.7, 6]), pa.ShapeError, "got 5.7"),  # type: ignore[list-item]
        (Request([5], new_tokens=2.5), pa.ShapeError, "got 2.5"),  # type: ignore[arg-type]
        (Request([5], new_tokens=0), pa.ShapeError, "new_tokens: expected an integer of at least 1, got 0"),
        (Request([5], "sumarise"), pa.UnknownTask, "'upper'.*'sumarise'"),
        (Request([5] * 10, "upper", 60), pa.ContextOverflow, "10 tokens, a prefix of 6 and 60 .* at most 49 new"),
        (Request([5] * 10, None, 60), pa.ContextOverflow, "at most 55 new"),
        (Request([5] * 70, "upper"), pa.ContextOverflow, "shorten the prompt"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    engine: Engine, request_: Request, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        answers(engine, request_)
    assert answers(engine, Request([5], "upper", 2)), "the engine goes on"


@needs_engine
def test_a_prompt_that_is_too_long_is_not_walked_through(engine: Engine) -> None:
    class Unread(list[int]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("its length is enough")

    with pytest.raises(pa.ContextOverflow, match="shorten the prompt"):
        engine.new_tokens(Request(Unread([5] * 1000), "upper"))


@needs_engine
def test_as_many_tokens_as_there_is_room(served: Served, engine: Engine) -> None:
    """64 positions: the answer may have one more than there are, for the last is not fed back."""
    engine.ends = []
    for task, prefix in ((None, 0), ("upper", served.bank.prefix_len("upper"))):
        ((tokens, finish),) = answers(engine, Request([5] * 40, task))
        assert (len(tokens), finish) == (64 - prefix - 40 + 1, "length")


@needs_engine
def test_as_many_tokens_as_the_models_config_says(served: Served) -> None:
    served.model.generation_config.max_new_tokens = 3
    with Engine(served.model, cache_tokens=256) as engine:
        engine.ends = []
        made = answers(engine, Request([5] * 40), Request([5] * 40, new_tokens=5), Request([5] * 63))
    assert [len(tokens) for tokens, _ in made] == [3, 5, 2]


@needs_engine
def test_a_cache_smaller_than_the_context(served: Served) -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    pa.patch(model, make_bank(model))
    with Engine(model, cache_tokens=192) as engine:
        assert engine.cache_tokens == 192
        with pytest.raises(pa.ContextOverflow, match="192 tokens of the engine's cache; ask for at most 93 new"):
            answers(engine, Request([5] * 100, "five", 100))
        made = answers(engine, *(Request([5] * 100, task, 93) for task in ("five", "nine", None)))
    assert [len(tokens) for tokens, _ in made] == [93] * 3, "they wait for one another"


@needs_engine
def test_a_request_that_nobody_reads_any_more_is_cancelled(served: Served, engine: Engine) -> None:
    engine.ends = []

    async def leave() -> None:
        pieces = engine.answer(Request([5] * 4, "upper"))
        async for _ in pieces:
            break
        await pieces.aclose()  # type: ignore[attr-defined]
        await settled(lambda: not engine._manager._task_of)

    asyncio.run(leave())
    served.bank.remove("upper")
    assert served.bank.lengths[0] == -1, "nobody holds it"


@needs_engine
def test_a_cancellation_makes_room_for_those_who_wait() -> None:
    """When the cache is short the engine puts a request back, and takes in nobody until another is finished."""
    model = tiny_model("llama", max_position_embeddings=512)
    pa.patch(model, make_bank(model))
    model.generation_config.eos_token_id = None
    with Engine(model, cache_tokens=192) as engine:
        scheduler = engine._scheduler

        async def leave_the_other() -> list[int]:
            first = engine.answer(Request([5] * 60, "five", 120))
            await anext(first)
            second = asyncio.create_task(answer(engine, Request([6] * 60, "nine", 120)))
            await settled(lambda: scheduler.block_new_requests)
            running = scheduler.active_requests
            if len(running) == 1 and next(iter(running.values())).initial_tokens[0] == 5:
                await first.aclose()  # type: ignore[attr-defined]
            return (await asyncio.wait_for(second, 60))[0]

        tokens = asyncio.run(leave_the_other())
        alone = model.generate(torch.tensor([[6] * 60]), max_new_tokens=120, do_sample=False, task_ids=["nine"])
        assert tokens == alone[0, 60:].tolist()
        assert answers(engine, Request([7], None, 2))


@needs_engine
def test_a_patch_that_is_undone_in_a_step(served: Served, engine: Engine) -> None:
    """The step's tokens are of a model that was half patched: nobody gets them."""
    handle = served.model.model.layers[1].register_forward_pre_hook(lambda *_: pa.unpatch(served.model) and None)
    with pytest.raises(EngineFailed, match="unpatched"):
        answers(engine, Request([5], "upper", 1))
    handle.remove()


@needs_engine
def test_tasks_change_while_requests_run(served: Served, engine: Engine) -> None:
    tokens = served.tokenizer(PROMPT)["input_ids"]

    async def swap() -> tuple[list[int], list[int]]:
        old: list[int] = []
        async for piece in engine.answer(Request(tokens, "upper")):
            if not old:
                served.bank.add("upper", served.bank.key_values("reverse"), replace=True)
                new = asyncio.create_task(answer(engine, Request(tokens, "upper")))
            old += piece.tokens
        return old, (await new)[0]

    decode: Any = served.tokenizer.decode
    assert [decode(x, skip_special_tokens=True) for x in asyncio.run(swap())] == [ANSWERS["upper"], ANSWERS["reverse"]]


@needs_engine
def test_an_engine_that_fails_says_so(served: Served, engine: Engine) -> None:
    pa.unpatch(served.model)  # what else could happen to a model behind an engine's back
    with pytest.raises(EngineFailed, match="unpatched"):
        answers(engine, Request([5], "upper"))
    asyncio.run(settled(lambda: engine.failure is not None))
    with pytest.raises(EngineFailed, match=r"the engine stopped: .*unpatched"):
        answers(engine, Request([5], "upper"))
    assert "unpatched" in str(engine.failure)


@needs_engine
def test_a_request_whose_scores_are_no_numbers_fails_alone(served: Served, engine: Engine) -> None:
    """As where float16 overflows; here by a prefix of finite values."""
    large = [(torch.full_like(k, 3e38), torch.full_like(v, 3e38)) for k, v in served.bank.key_values("upper")]
    served.bank.add("bad", large)
    tokens = served.tokenizer(PROMPT)["input_ids"]

    async def together() -> list[Any]:
        requests = [
            Request(tokens, task, sampling=how) for task in ("upper", "bad") for how in (Sampling(), Sampling(1.0))
        ]
        return await asyncio.gather(*(answer(engine, request) for request in requests), return_exceptions=True)

    for _ in range(2):
        greedy, sampled, *bad = asyncio.run(together())
        assert served.tokenizer.decode(greedy[0], skip_special_tokens=True) == ANSWERS["upper"]
        assert sampled[1] in ("stop", "length")
        assert [type(error) for error in bad] == [EngineFailed] * 2
        assert "no finite numbers" in str(bad[0])
    assert engine.failure is None
    asyncio.run(settled(lambda: engine.running == 0))
    assert not engine._manager._task_of
    assert not engine._manager._failed


@needs_engine
def test_an_engine_that_does_not_run(served: Served) -> None:
    engine = Engine(served.model, cache_tokens=256)
    with pytest.raises(EngineFailed, match="not started"):
        answers(engine, Request([5]))
    with engine:
        assert answers(engine, Request([5], None, 1))
    with pytest.raises(EngineFailed, match="was stopped"):
        answers(engine, Request([5]))


@needs_engine
def test_requests_that_run_when_the_engine_stops_fail(served: Served) -> None:
    engine = Engine(served.model, cache_tokens=256)
    engine.start()
    engine.ends = []

    async def stop() -> None:
        with contextlib.suppress(StopAsyncIteration):
            async for _ in engine.answer(Request([5], None)):
                await asyncio.to_thread(engine.stop)

    with pytest.raises(EngineFailed):
        asyncio.run(stop())


@needs_engine
def test_requests_that_come_while_the_engine_stops_end(served: Served) -> None:
    """Between the queue and the batch, or in the queue when nobody reads it any more: they fail, and hold nothing."""
    engine = Engine(served.model, cache_tokens=256)
    for delay in range(12):
        engine.start()

        async def ask(delay: int = delay) -> None:
            asked = [asyncio.create_task(answer(engine, Request([5], "upper", 40))) for _ in range(3)]
            await asyncio.sleep(delay / 1000)
            await asyncio.to_thread(engine.stop)
            for one in await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 20):
                assert isinstance(one, (EngineFailed, tuple))

        asyncio.run(ask())
        assert engine._manager._task_of == {}
    served.bank.remove("upper")
    assert served.bank.lengths[0] == -1


@needs_engine
def test_several_event_loops(engine: Engine) -> None:
    """Each gets its own answers; one that was closed in the middle stops nobody."""
    engine.ends = []
    gone = asyncio.new_event_loop()
    gone.run_until_complete(engine.answer(Request([5], None)).__anext__())
    gone.close()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda task: answers(engine, Request([5], task, 40))[0], ("upper", None, "sort", None)))
    assert [len(tokens) for tokens, _ in made] == [40] * 4
    assert made[1] == made[3]
    assert engine.failure is None
    asyncio.run(settled(lambda: engine.running == 0))


@needs_engine
def test_cancelled_requests_leave_nothing_behind(engine: Engine) -> None:
    """Whenever it happens, also before the engine has seen the request."""
    engine.ends = []

    async def leave(pieces: int) -> None:
        async for _ in (answer := engine.answer(Request([5], "upper"))):
            pieces -= 1
            if pieces <= 0:
                break
        await answer.aclose()  # type: ignore[attr-defined]

    async def all_leave() -> None:
        await asyncio.gather(*(leave(i % 5) for i in range(30)))
        for _ in range(10):
            task = asyncio.create_task(leave(9))
            await asyncio.sleep(0)
            task.cancel()
        await settled(lambda: not manager._task_of)

    manager = engine._manager
    cancel = ContinuousBatchingManager.cancel_request

    def slowly(self: Any, name: str) -> None:  # outputs come while a request is being cancelled
        time.sleep(0.002)
        cancel(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuousBatchingManager, "cancel_request", slowly)
        asyncio.run(all_leave())
    asyncio.run(settled(lambda: not manager._cancelled))
    assert manager.output_router.result_handlers == {}
    assert manager.output_router.output_queue.empty()


@needs_engine
def test_a_cancellation_that_overtakes_its_request(served: Served, engine: Engine) -> None:
    manager = engine._manager
    with manager.pause():
        manager.bank.hold([0])
        manager._task_of["late"] = 0
        manager.cancel_request("late")
    asyncio.run(settled(lambda: manager.cancel_queue.empty()))
    assert manager._cancelled == {"late"}
    ContinuousBatchingManager.add_request(manager, [5, 6], "late", 50)
    asyncio.run(settled(lambda: not manager._task_of))
    assert manager._cancelled == set()
    assert manager.output_router.output_queue.empty()
