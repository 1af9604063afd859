"""What a cache, or an encoder's states, remember of the tasks that they were computed with."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import prefix_attn as pa
from prefix_attn.bank.cache_argument import CACHE, OLD
from prefix_attn.hf.caches import MARK
from prefix_attn.hf.sources import fill
from tests.hf.conftest import TASKS, make_bank
from tests.hf.families import random_prefix
from tests.hf.shrink import tiny_random_model
from tests.hf.survey import random_bank
from tests.hf.test_hazards import GREEDY, X, logits, patched
from tests.hf.test_seq2seq import make_bank as make_seq2seq_bank
from tests.seq2seq import tiny_seq2seq


class TestCaches:
    """Tokens in a cache were computed with the tasks of their pass, of its bank; others cannot follow."""

    @pytest.fixture
    def model(self) -> Any:
        return patched("llama")

    def prefill(self, model: Any, cache: Any = None, **options: Any) -> Any:
        cache = DynamicCache(config=model.config) if cache is None else cache
        logits(model, past_key_values=cache, **options)
        return cache

    def follow(self, model: Any, cache: Any, tasks: Any) -> None:
        ids = X["input_ids"][:1].expand(len(tasks), -1)
        with torch.no_grad():
            model(ids, past_key_values=cache, task_ids=tasks)

    def refuses(self, model: Any, cache: Any, tasks: Any, match: str = "were computed") -> None:
        with pytest.raises(pa.IncompatiblePrefix, match=match):
            self.follow(model, cache, tasks)

    def test_without_tasks_before(self, model: Any) -> None:
        self.refuses(model, self.prefill(model), TASKS)
        self.follow(model, self.prefill(model), [None] * 4)

    def test_filled_by_somebody_else(self, model: Any) -> None:
        cache = DynamicCache(config=model.config)
        fill(cache, [random_prefix(model, 3, 0)] * 4)
        self.refuses(model, cache, TASKS, match="outside the patched model")

    def test_another_bank(self, model: Any) -> None:
        cache = self.prefill(model, task_ids=TASKS)
        pa.patch(model, make_bank(model))
        self.refuses(model, cache, TASKS, match="of another bank")
        cache.batch_repeat_interleave(2)
        self.refuses(model, cache, [task for task in TASKS for _ in range(2)], match="of another bank")

    def test_copied_rows(self, model: Any) -> None:
        cache = self.prefill(model, task_ids=TASKS)
        cache.batch_repeat_interleave(2)
        self.follow(model, cache, [task for task in TASKS for _ in range(2)])
        cache = self.prefill(model, task_ids=["five"] * 4)
        cache.batch_repeat_interleave(2)
        self.refuses(model, cache, ["nine"] * 8)
        cache = self.prefill(model, task_ids=TASKS)
        cache.batch_repeat_interleave(2)
        self.refuses(model, cache, TASKS * 2)  # the same tasks, of other rows

    def test_dropped_rows(self, model: Any) -> None:
        cache = self.prefill(model, task_ids=TASKS)
        cache.batch_select_indices(torch.tensor([1, 3]))
        self.refuses(model, cache, [TASKS[3], TASKS[1]])
        self.follow(model, cache, [TASKS[1], TASKS[3]])

    @pytest.mark.parametrize("tasks", [["nine"] * 4, [None] * 4])
    def test_static(self, model: Any, tasks: Any) -> None:
        cache = self.prefill(model, StaticCache(config=model.config, max_cache_len=40), task_ids=TASKS)
        self.refuses(model, cache, tasks)
        self.follow(model, cache, TASKS)

    def test_ids_that_are_written(self, model: Any) -> None:
        ids = torch.zeros(4, dtype=torch.int32)
        cache = self.prefill(model, task_ids=ids)
        self.follow(model, cache, ids)
        ids.fill_(1)
        self.refuses(model, cache, ids)
        with torch.inference_mode():
            ids = torch.zeros(4, dtype=torch.int32)
            cache = self.prefill(model, task_ids=ids)
            ids.fill_(1)
            self.refuses(model, cache, ids)

    def test_a_stored_cache_remembers_its_tasks(self, model: Any) -> None:
        mark = pickle.loads(pickle.dumps(getattr(self.prefill(model, task_ids=TASKS), MARK)))
        cache = self.prefill(model, task_ids=TASKS)
        setattr(cache, MARK, mark)
        self.refuses(model, cache, ["nine"] * 4)
        self.follow(model, cache, TASKS)


def test_compiled_passes_leave_their_mark() -> None:
    """They do not compare tasks themselves; the eager pass behind them does, and so does generate in front of them."""
    model = patched("llama")
    step = torch.compile(model, backend="eager", fullgraph=True)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = step(**X, past_key_values=cache, use_cache=True, task_ids=TASKS)
        token, mask = out.logits[:, -1:].argmax(-1), torch.ones(4, X["input_ids"].shape[1] + 1)
        for tasks in (None, TASKS[::-1]):
            with pytest.raises(pa.IncompatiblePrefix, match="were computed with tasks"):
                model(token, attention_mask=mask, past_key_values=cache, task_ids=tasks)
        model(token, attention_mask=mask, past_key_values=copy.deepcopy(cache), task_ids=TASKS)
        model.forward = torch.compile(model.forward, backend="eager")
        both = torch.cat([X["input_ids"], token], 1)
        for options in ({}, {"task_ids": TASKS[::-1]}):
            with pytest.raises(pa.IncompatiblePrefix, match="were computed with tasks"):
                model.generate(both, attention_mask=mask, past_key_values=cache, **options, **GREEDY)


@pytest.mark.skipif(CACHE == OLD, reason="transformers calls a cache past_key_values before 5.24")
@pytest.mark.parametrize("family", ["llama", "gpt_neo", "t5"])
def test_a_cache_has_two_names(family: str) -> None:
    """For decoders, where its prefixes are copied into it, and for encoder-decoders; both are checked alike."""
    encoder_decoder = family == "t5"
    model = tiny_seq2seq(family) if encoder_decoder else tiny_random_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pa.SlowModel)
        pa.patch(model, (make_seq2seq_bank if encoder_decoder else random_bank)(model))
    ids, bank = X["input_ids"], model._prefix_attn.bank
    start = {"decoder_input_ids": torch.zeros(4, 1, dtype=torch.long)} if encoder_decoder else {}
    tasks = [*bank.names, None, None][:4]
    logits = []
    for name in (CACHE, OLD):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if encoder_decoder else DynamicCache()
        with torch.no_grad():
            model(input_ids=ids, **start, **{name: cache}, task_ids=tasks)
            logits.append(model(input_ids=ids, **start, **{name: cache}, task_ids=tasks).logits)
        for wrong in (tasks[::-1], None):
            with pytest.raises(pa.IncompatiblePrefix, match="computed with tasks"):
                model(input_ids=ids, **start, **{name: cache}, task_ids=wrong)
    assert torch.equal(*logits)


@pytest.mark.skipif(CACHE == OLD, reason="transformers calls a cache past_key_values before 5.24")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_two_names_the_new_one_counts_even_if_it_says_none(family: str) -> None:
    model = patched(family)
    filled = DynamicCache(config=model.config)
    body = model.base_model
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        body(**X, cache=filled, task_ids=TASKS)
        got = body(**X, cache=None, past_key_values=filled, task_ids=TASKS)[0]
        expected = body(**X, task_ids=TASKS)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(CACHE == OLD, reason="transformers calls a cache past_key_values before 5.24")
def test_the_name_of_state_space_models_is_a_cache_too() -> None:
    model = patched("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**X, cache=cache, task_ids=TASKS)
    both = {name: torch.cat([x, x], dim=1) for name, x in X.items()}
    with pytest.raises(pa.ShapeError, match="truncation"):
        model.generate(**both, cache_params=cache, truncation=True, task_ids=TASKS)


def test_a_cache_in_a_tuple_is_marked() -> None:
    model = patched("llama")
    cache = DynamicCache(config=model.config)
    body = model.base_model
    with torch.no_grad():
        body(X["input_ids"], **{CACHE: cache}, task_ids=TASKS, return_dict=False)
        with pytest.raises(pa.IncompatiblePrefix):
            body(X["input_ids"], **{CACHE: cache}, return_dict=False)
        body(X["input_ids"], **{CACHE: cache}, task_ids=TASKS, return_dict=False)


def test_a_cache_given_by_position_is_checked_too() -> None:
    model = patched("llama")
    cache = DynamicCache(config=model.config)
    logits(model, past_key_values=cache, task_ids=TASKS)
    with pytest.raises(pa.IncompatiblePrefix, match="computed with tasks"):
        model.model(X["input_ids"], None, None, cache)


@pytest.mark.parametrize("family", ["t5", "bart"])
class TestEncodersKeys:
    def call(self, model: Any, cache: Any, tasks: Any) -> torch.Tensor:
        ids = X["input_ids"]
        options = {} if tasks is None else {"task_ids": tasks}
        with torch.no_grad():
            return model(input_ids=ids, decoder_input_ids=ids[:, :4], past_key_values=cache, **options).logits

    def test_a_crop_leaves_them_those_of_their_tasks(self, family: str) -> None:
        model = tiny_seq2seq(family)
        bank = make_seq2seq_bank(model)
        pa.patch(model, bank)
        tasks, others = [bank.names[0], None, bank.names[1], bank.names[-1]], [bank.names[-1]] * 4
        for before, after in ((tasks, others), (tasks, None), (None, tasks)):
            cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
            self.call(model, cache, before)
            cache.crop(-4)
            with pytest.raises(pa.IncompatiblePrefix):
                self.call(model, cache, after)

    def test_states_given_by_position_or_to_the_body_are_checked(self, family: str) -> None:
        model = tiny_seq2seq(family)
        bank = make_seq2seq_bank(model)
        pa.patch(model, bank)
        ids, mask = X["input_ids"], X["attention_mask"]
        states = model.get_encoder()(input_ids=ids, attention_mask=mask, task_ids=[bank.names[0]] * 4)
        names = list(inspect.signature(model.forward).parameters)
        given = {"attention_mask": mask, "decoder_input_ids": ids[:, :4], "encoder_outputs": states}
        listed = [given.get(name) for name in names[: names.index("encoder_outputs") + 1]]
        others = [bank.names[-1]] * 4
        with pytest.raises(pa.IncompatiblePrefix, match="encoder_outputs"):
            model(*listed, task_ids=others)
        if family == "bart":
            with pytest.raises(pa.IncompatiblePrefix, match="encoder_outputs"):
                model.model(**given, task_ids=others)

    def test_models_that_share_an_encoder_are_not_patched_both(self, family: str) -> None:
        first = tiny_seq2seq(family)
        second = copy.deepcopy(first)
        (second if family == "t5" else second.model).encoder = first.get_encoder()
        bank = make_seq2seq_bank(second)
        pa.patch(first, make_seq2seq_bank(first))
        with pytest.raises(pa.UnsupportedModel, match="with another patched model"):
            pa.patch(second, bank)
