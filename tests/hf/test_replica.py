"""Families served in the slow way (hf/replica.py): each row's cache begins with a copy of its prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, TrOCRForCausalLM

import prefix_attn as pa
from tests.hf.conftest import TASKS, padded_inputs
from tests.hf.shrink import tiny_config, tiny_random_model
from tests.hf.survey import random_bank
from tests.hf.test_hazards import GREEDY, X, logits


def test_the_slow_way() -> None:
    """Each row's cache begins with a copy of its prefix, which generate must not count."""
    model = tiny_random_model("gpt_neox_japanese")
    with pytest.warns(pa.SlowModel, match="copy of the prefix"):
        pa.patch(model, random_bank(model))
    inputs = padded_inputs()
    expected = model.generate(**inputs, **GREEDY, task_ids=TASKS)
    cache = DynamicCache(config=model.config)
    first = model.generate(**inputs, max_new_tokens=3, do_sample=False, task_ids=TASKS, past_key_values=cache)
    assert cache.get_seq_length() == first.shape[1] - 1
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 3, dtype=torch.long)], dim=1)
    again = {"input_ids": first, "attention_mask": mask, "past_key_values": cache}
    assert torch.equal(model.generate(**again, max_new_tokens=3, do_sample=False, task_ids=TASKS), expected)
    with pytest.raises(pa.IncompatiblePrefix, match="computed with tasks"):
        model.generate(**again, max_new_tokens=1, task_ids=["nine"] * 4)
    with pytest.raises(pa.UnsupportedModel, match="StaticCache"):
        model.generate(**inputs, **GREEDY, task_ids=TASKS, cache_implementation="static")
    assert torch.equal(model.generate(**inputs, **GREEDY, task_ids=TASKS, use_cache=False), expected)
    with pytest.raises(pa.UnsupportedModel, match="slow way"):
        model.generate_batch([[5, 6, 7]], task_ids=["nine"])
    pa.unpatch(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_the_slow_way_reads_a_cache_that_it_does_not_fill() -> None:
    model = tiny_random_model("gpt_neox_japanese")
    with pytest.warns(pa.SlowModel):
        pa.patch(model, random_bank(model))
    ids = padded_inputs(paddings=(0, 0, 0, 0))["input_ids"]
    found = []
    for use_cache in (True, False):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :5], past_key_values=cache, task_ids=TASKS)
            found.append(model(ids[:, 5:], past_key_values=cache, use_cache=use_cache, task_ids=TASKS).logits)
    assert torch.equal(*found)


def test_the_slow_way_leaves_no_prefix_for_other_tasks() -> None:
    """A pass that is refused, or breaks off, has put its prefixes into the cache by then."""
    model = tiny_random_model("gpt_neox_japanese")
    with pytest.warns(pa.SlowModel):
        pa.patch(model, random_bank(model))
    ids, cache = padded_inputs()["input_ids"], DynamicCache(config=model.config)
    with pytest.raises(pa.UnsupportedModel):
        model(ids, attention_mask=torch.ones(4, 1, 8, 8), past_key_values=cache, task_ids=TASKS)
    with pytest.raises(pa.IncompatiblePrefix, match="computed with tasks"):
        model(ids, past_key_values=cache, task_ids=["nine"] * 4)


@pytest.mark.filterwarnings("ignore:served in the slow way")
class TestPrefixesInTheCache:
    """In families served in the slow way a cache holds prefixes, which nobody else may take for tokens."""

    @pytest.fixture
    def model(self) -> Any:
        model = tiny_random_model("gpt_neox_japanese")
        return pa.patch(model, random_bank(model))

    def prefill(self, model: Any, tokens: int = 5) -> Any:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(X["input_ids"][:, :tokens], past_key_values=cache, task_ids=TASKS)
        return cache

    def talk(self, model: Any) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
        """A cache of one turn, the two turns, and what should follow them."""
        cache = DynamicCache(config=model.config)
        first = model.generate(**X, **GREEDY, task_ids=TASKS, past_key_values=cache)
        both = torch.cat([first, X["input_ids"].flip(1), X["input_ids"]], dim=1)
        inputs = {"input_ids": both, "attention_mask": torch.ones_like(both)}
        return cache, inputs, model.generate(**inputs, **GREEDY, task_ids=TASKS)

    def test_a_refused_call_does_not_disturb_the_next(self, model: Any) -> None:
        cache, inputs, expected = self.talk(model)
        with pytest.raises(pa.IncompatiblePrefix):
            model.generate(**inputs, **GREEDY, task_ids=["nine"] * 4, past_key_values=cache)
        assert torch.equal(model.generate(**inputs, **GREEDY, task_ids=TASKS, past_key_values=cache), expected)

    def test_nor_does_an_interrupt(self, model: Any) -> None:
        cache, inputs, expected = self.talk(model)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.get_input_embeddings().register_forward_pre_hook(interrupt)
        new = inputs["input_ids"][:, cache.get_seq_length() :]
        with pytest.raises(KeyboardInterrupt):
            model(new, attention_mask=inputs["attention_mask"], past_key_values=cache, task_ids=TASKS)
        hook.remove()
        assert torch.equal(model.generate(**inputs, **GREEDY, task_ids=TASKS, past_key_values=cache), expected)

    def test_they_are_nobody_elses(self, model: Any) -> None:
        rest = X["input_ids"][:, 5:]
        cropped = self.prefill(model)
        cropped.crop(-5)
        with pytest.raises(pa.IncompatiblePrefix, match="computed with tasks"):
            model(rest, past_key_values=cropped)
        with pytest.raises(pa.IncompatiblePrefix, match="only the patched model knows"):
            model.base_model(rest, past_key_values=self.prefill(model))
        cropped = self.prefill(model)
        cropped.crop(-8)
        with pytest.raises(pa.IncompatiblePrefix, match="cropped with its tokens"):
            model(rest, past_key_values=cropped, task_ids=TASKS)
        cache = self.prefill(model)
        pa.unpatch(model)
        with pytest.raises(pa.IncompatiblePrefix, match="only the patched model knows"):
            model(rest, past_key_values=cache)

    def test_rows_are_repeated_and_reset_as_in_any_cache(self, model: Any) -> None:
        ids, tasks = X["input_ids"], [task for task in TASKS for _ in range(2)]
        expected = logits(model, task_ids=TASKS)
        cache = self.prefill(model)
        cache.batch_repeat_interleave(2)
        with torch.no_grad():
            twice = model(ids[:, 5:].repeat_interleave(2, 0), past_key_values=cache, task_ids=tasks).logits
        torch.testing.assert_close(twice, expected[:, 5:].repeat_interleave(2, 0))
        cache.reset()
        if cache.get_seq_length():  # transformers 5.17 leaves zeros in the place of tokens
            with pytest.raises(pa.UnsupportedModel, match="expected an empty DynamicCache"):
                model(ids, past_key_values=cache, task_ids=TASKS)
            return
        with torch.no_grad():
            torch.testing.assert_close(model(ids, past_key_values=cache, task_ids=TASKS).logits, expected)

    def test_what_would_be_lost_is_refused(self, model: Any) -> None:
        ids = X["input_ids"]
        with pytest.raises(pa.UnsupportedModel, match="the whole model takes them, not its GPTNeoXJapaneseModel"):
            model.base_model(ids, task_ids=TASKS)
        with pytest.raises(pa.ShapeError, match="expected 8 columns"):
            model(ids[:, 5:], attention_mask=torch.ones(4, 3), past_key_values=self.prefill(model), task_ids=TASKS)
        config = tiny_config("trocr")
        config.is_decoder = config.add_cross_attention = True
        trocr = TrOCRForCausalLM(config).eval()
        pa.patch(trocr, random_bank(trocr))
        states = torch.randn(4, 7, config.cross_attention_hidden_size or config.hidden_size)
        with pytest.raises(pa.UnsupportedModel, match="encoder_hidden_states"):
            trocr(ids, encoder_hidden_states=states, task_ids=[None] * 4)


@pytest.mark.filterwarnings("ignore::prefix_attn.SlowModel")
def test_keys_are_not_chosen_among_padding() -> None:
    """Doge sees its best 12 of 17 slots or more; rows with shorter prefixes have slots that are padding."""
    model = tiny_random_model("doge")
    for module in model.modules():
        if hasattr(module, "keep_window_size"):
            module.keep_window_size = 12
    model.config.keep_window_size = 12
    pa.patch(model, random_bank(model))
    alone = torch.cat([logits(model, **{k: x[r : r + 1] for k, x in X.items()}, task_ids=["nine"]) for r in range(4)])
    torch.testing.assert_close(logits(model, task_ids=["nine"] * 4), alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(pa.UnsupportedModel, match=r"expected prefixes of one length, .* keep_window_size = 12"):
        logits(model, task_ids=TASKS)
