"""Text in, text out, on the shipped example: pipelines, streaming and stop strings, each row with its own task."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

import prefix_attn as pa
from tests.hf.shrink import tiny_random_model

EXAMPLE = Path(__file__).parents[2] / "examples/string_tasks"
PROMPTS = ["hello>", "world>", "abc>", "sort|hello>", "abcdef>"]
TASKS = ["reverse", "upper", "reverse", None, "rot13"]
ANSWERS = ["olleh", "WORLD", "cba", "ehllo", "nopqrs"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


class Example(NamedTuple):
    model: Any
    tokenizer: Any

    def pipeline(self, **options: Any) -> Any:
        return transformers.pipeline("text-generation", model=self.model, tokenizer=self.tokenizer, **options)


@pytest.fixture(scope="module")
def example() -> Example:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model")
    bank = pa.PrefixBank.for_model(model)
    for name in ("reverse", "upper", "rot13"):
        bank.load(name, EXAMPLE / "adapters" / name)
    return Example(pa.patch(model, bank), AutoTokenizer.from_pretrained(EXAMPLE / "model"))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pipeline_with_a_task_per_prompt(example: Example, batch_size: int) -> None:
    pipe = example.pipeline(pipeline_class=pa.TextGenerationPipeline)
    out = pipe(PROMPTS, task_ids=TASKS, batch_size=batch_size, return_full_text=False, **OPTIONS)
    assert [results[0]["generated_text"] for results in out] == ANSWERS
    assert pipe("hello>", task_ids=["upper"], **OPTIONS)[0]["generated_text"] == "hello>HELLO"
    assert pipe("sort|hello>", **OPTIONS)[0]["generated_text"] == "sort|hello>ehllo"


def test_pipeline_refuses_what_does_not_fit(example: Example) -> None:
    pipe = example.pipeline(pipeline_class=pa.TextGenerationPipeline)
    with pytest.raises(pa.ShapeError, match="5 in all, got 2"):
        pipe(PROMPTS, task_ids=["upper", None], batch_size=2, **OPTIONS)
    with pytest.raises(pa.UnknownTask, match=r"task_ids\[4\].*'lower'"):
        pipe(PROMPTS, task_ids=[*TASKS[:4], "lower"], **OPTIONS)
    with pytest.raises(pa.UnsupportedModel, match="list of prompts"):
        pipe((prompt for prompt in PROMPTS), task_ids=TASKS, **OPTIONS)
    with pytest.raises(pa.ShapeError, match="pipeline_class"):
        example.pipeline()(PROMPTS, task_ids=TASKS, batch_size=2, **OPTIONS)


def test_pipeline_ends_with_the_prefixes_it_began_with(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, bank = example.pipeline(pipeline_class=pa.TextGenerationPipeline), example.model.generate.bank
    bank.load("mine", EXAMPLE / "adapters" / "reverse")
    batches = []

    def replacing(*args: Any, **options: Any) -> Any:
        batches.append(pa.TextGenerationPipeline._forward(pipe, *args, **options))
        bank.load("mine", EXAMPLE / "adapters" / "upper", replace=True)
        return batches[-1]

    monkeypatch.setattr(pipe, "_forward", replacing)
    out = pipe(PROMPTS, task_ids=["mine"] * 5, batch_size=2, return_full_text=False, **OPTIONS)
    assert len(batches) == 3
    assert [results[0]["generated_text"] for results in out[:2]] == ["olleh", "dlrow"]
    assert out[2][0]["generated_text"] == "cba", "in the second batch"
    bank.remove("mine")
    assert sum(m >= 0 for m in bank.lengths) == 3, "nobody holds what was replaced"


def test_streaming(example: Example) -> None:
    streamer = TextIteratorStreamer(example.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    inputs = example.tokenizer("hello>", return_tensors="pt")
    arguments = inputs | OPTIONS | {"task_ids": ["reverse"], "streamer": streamer}
    thread = threading.Thread(target=example.model.generate, kwargs=arguments)
    thread.start()
    assert "".join(streamer) == "olleh"
    thread.join()


def test_stop_strings(example: Example) -> None:
    inputs = example.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    out = example.model.generate(
        **inputs, **OPTIONS, task_ids=TASKS, stop_strings=["lle", "OR"], tokenizer=example.tokenizer
    )
    texts = example.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == ["olle", "WOR", "cba", "ehllo", "nopqrs"]


def test_a_text_as_prefix_opens_the_sequence_once(example: Example) -> None:
    """With the opening token in front of the prompt again, which tokenizers put there by themselves, it warns."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model"), example.tokenizer
    bank = pa.PrefixBank.for_model(model)
    bank.add_text("told", tokenizer, "sort|", model)
    bank.load("upper", EXAMPLE / "adapters" / "upper")
    assert (bank.source("told"), bank.source("upper")) == ("text", "peft:upper")
    pa.patch(model, bank)
    asked = {"return_tensors": "pt", "return_token_type_ids": False, "padding": True}
    inputs = tokenizer(["hello>", "hi>"], add_special_tokens=False, **asked)
    tokens = model.generate(**inputs, task_ids=["told", "told"], **OPTIONS)
    said = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert [text.partition(">")[2] for text in said] == ["ehllo", "hi"]
    inputs = tokenizer(["hello>", "hi>"], **asked)
    with pytest.warns(pa.RepeatedBOS, match="row 1: its prompt begins with the BOS token, after the text of 'told'"):
        model.generate(**inputs, task_ids=["upper", "told"], **OPTIONS)
    model.generate(**inputs, task_ids=["upper", None], **OPTIONS)
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    with pytest.warns(pa.RepeatedBOS, match="row 1"):
        model.generate(**inputs, task_ids=["upper", "told"], **OPTIONS)


def test_a_conversation_behind_a_text_goes_on_with_its_new_tokens_alone(example: Example) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model"), example.tokenizer
    bank = pa.PrefixBank.for_model(model)
    bank.add_text("told", tokenizer, "sort|", model)
    pa.patch(model, bank)
    asked = {"return_tensors": "pt", "return_token_type_ids": False, "padding": True, "add_special_tokens": False}
    inputs = tokenizer(["hello", "hi"], **asked)
    cache = model(**inputs, task_ids=["told", "told"], use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    more = tokenizer([">", ">"], **asked)["input_ids"]
    tokens = model.generate(
        input_ids=torch.cat([inputs["input_ids"], more], dim=1), attention_mask=mask, past_key_values=cache,
        task_ids=["told", "told"], **OPTIONS,
    )  # fmt: skip
    said = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert [text.partition(">")[2] for text in said] == ["ehllo", "hi"]
    cache = model(**inputs, task_ids=["told", "told"], use_cache=True).past_key_values
    tokens = model.generate(
        input_ids=more, attention_mask=mask, past_key_values=cache, task_ids=["told", "told"], **OPTIONS
    )
    assert [text.partition(">")[2] for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)] == [
        "ehllo",
        "hi",
    ]


def test_a_text_where_the_family_counts_from_padding() -> None:
    """RoBERTa's forward begins at padding_idx + 1, transformers' generate at 0: so does the text, which it follows."""
    model = tiny_random_model("roberta")
    ids = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
    bank = pa.PrefixBank.for_model(model)
    bank.add_text("text", lambda *_, **__: {"input_ids": ids[0, :5].tolist()}, "a text", model)
    pa.patch(model, bank)
    own = ids[:, 5:]
    got = model.generate(input_ids=own, attention_mask=torch.ones_like(own), task_ids=["text"], **options).logits
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), rtol=1e-5, atol=1e-5)
