"""What encoder-decoder models promise beside the matrix of modes: caches, compilation, training, the patch itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, CompileConfig, DynamicCache, EncoderDecoderCache
from transformers.generation.streamers import BaseStreamer

import prefix_attn as pa
from tests.hf.seq2seq_replica import replicated
from tests.hf.test_seq2seq import ROWS, TASKS, TOLERANCE, decoder_tokens, make_bank, make_inputs, one_row
from tests.hf.threads import wrong_in_threads
from tests.seq2seq import random_parts, tiny_seq2seq

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=["t5", "bart"])
def patched(request: pytest.FixtureRequest) -> Any:
    model = tiny_seq2seq(request.param)
    return pa.patch(model, make_bank(model))


def parts_of(model: Any, task: str | None) -> dict[str, Any]:
    bank = model._prefix_attn.bank
    return {} if task is None else random_parts(bank, TASKS[task], list(TASKS).index(task))


def test_mixed_sampling_is_from_each_tasks_distribution(patched: Any) -> None:
    inputs = make_inputs(patched)
    out = patched.generate(
        **inputs, max_new_tokens=6, do_sample=True, top_k=0, task_ids=ROWS, output_logits=True,
        return_dict_in_generate=True, output_hidden_states=True, eos_token_id=98,
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    assert len(out.decoder_hidden_states) == 6
    assert out.past_key_values.get_seq_length() == 6, "the cache holds the decoder's own tokens"
    with torch.no_grad():
        for row, task in enumerate(ROWS):
            with replicated(tiny_seq2seq(patched.config.model_type), parts_of(patched, task)) as model:
                theirs = model(**one_row(inputs, row), decoder_input_ids=out.sequences[row : row + 1, :-1]).logits[0]
            assert (logits[row] - theirs).abs().max() < TOLERANCE


def test_decoding_goes_on_from_a_cache(patched: Any) -> None:
    """Three tokens, then three more on the same caches, behind an encoder that ran before.

    (The new tokens alone cannot be given: transformers puts a start token before what does not begin with one.)
    """
    inputs = make_inputs(patched)
    options = {"do_sample": False, "eos_token_id": 98, "task_ids": ROWS}
    expected = patched.generate(**inputs, **options, max_new_tokens=6)
    with torch.no_grad():
        states = patched.get_encoder()(**inputs, task_ids=ROWS)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    given = {"encoder_outputs": states, "attention_mask": inputs["attention_mask"], "past_key_values": cache}
    begun = patched.generate(**given, **options, max_new_tokens=3)
    given |= {"decoder_input_ids": begun, "decoder_attention_mask": torch.ones_like(begun)}
    for wrong, words in (
        ([*ROWS[:3], "cross", *ROWS[4:]], "computed with tasks"),
        ([None] * 6, "the encoder ran with"),
    ):
        with pytest.raises(pa.IncompatiblePrefix, match=words):
            patched.generate(**given, **GREEDY, task_ids=wrong)
    assert torch.equal(patched.generate(**given, **options, max_new_tokens=3), expected)


def test_an_encoders_output_belongs_to_its_tasks(patched: Any) -> None:
    """Of ROWS, the first, third and last have prefixes in the encoder; the decoder's alone may differ."""
    inputs, encoder = make_inputs(patched), patched.get_encoder()
    tokens = {"decoder_input_ids": decoder_tokens(), "attention_mask": inputs["attention_mask"]}
    others: list[str | None] = ["decoder", "cross", None, "decoder", None, "cross"]
    with torch.no_grad():
        for made, asked in ((ROWS, others), (None, ROWS), (ROWS, None)):
            states = encoder(**inputs) if made is None else encoder(**inputs, task_ids=made)
            given: dict[str, Any] = {"encoder_outputs": states} | ({} if asked is None else {"task_ids": asked})
            for call in (lambda: patched(**tokens, **given), lambda: patched.generate(**tokens, **GREEDY, **given),  # noqa: B023
                         lambda: patched.generate(**tokens, **GREEDY, num_beams=2, **given)):  # fmt: skip # noqa: B023
                with pytest.raises(pa.IncompatiblePrefix, match="the encoder ran with tasks"):
                    call()
        bare = patched(**tokens, encoder_outputs=encoder(**inputs), task_ids=others).logits
        whole = patched(**inputs, decoder_input_ids=decoder_tokens(), task_ids=others).logits
        assert (bare - whole).abs().max() < TOLERANCE
        pa.unpatch(patched)
        patched(**tokens, encoder_outputs=states)


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming(patched: Any) -> None:
    inputs, heard = one_row(make_inputs(patched), 0), Heard()
    expected = patched.generate(**inputs, **GREEDY, task_ids=["all"])
    patched.generate(**inputs, **GREEDY, task_ids=["all"], streamer=heard)
    assert heard.ended
    assert heard.tokens == expected[0].tolist()


def test_chunked_prefill_is_refused(patched: Any) -> None:
    """In transformers itself it changes the logits of a padded row."""
    with pytest.raises(pa.UnsupportedModel, match="cuts the mask of the encoder's input"):
        patched.generate(**make_inputs(patched), **GREEDY, task_ids=ROWS, prefill_chunk_size=3)


def test_compiled_generate(patched: Any) -> None:
    """transformers' own compilation of decode; other tasks need no other graph."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    inputs = make_inputs(patched)
    for tasks in (ROWS, ["encoder", "all", None, None, "all", "decoder"]):
        expected = patched.generate(**inputs, **GREEDY, task_ids=tasks)
        with torch._dynamo.config.patch(error_on_recompile=tasks is not ROWS):
            assert torch.equal(patched.generate(**inputs, **GREEDY, **compiled, task_ids=tasks), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_gradients_equal_a_replicas(family: str) -> None:
    """Training the model's weights under fixed prefixes, with and without gradient checkpointing."""
    model = tiny_seq2seq(family, dropout_rate=0.0, attention_dropout=0.0, dropout=0.0).train()
    bank = make_bank(model)
    inputs, tokens = make_inputs(model), decoder_tokens()

    def gradients(**options: Any) -> dict[str, Tensor]:
        model.zero_grad()
        model(
            **one_row(inputs, 0), decoder_input_ids=tokens[:1], use_cache=False, **options
        ).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with replicated(model, random_parts(bank, TASKS["all"], 0)):
        expected = gradients()
    pa.patch(model, bank)
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        for name, grad in gradients(task_ids=["all"]).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))


def logits_of(model: Any, tasks: list[str | None] | None) -> Tensor:
    options = {} if tasks is None else {"task_ids": tasks}
    with torch.no_grad():
        logits: Tensor = model(**make_inputs(model), decoder_input_ids=decoder_tokens(), **options).logits
    return logits


def test_patching_again_and_with_another_bank(patched: Any) -> None:
    expected = logits_of(patched, ROWS)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in patched.modules()]
    pa.patch(patched, patched._prefix_attn.bank)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in patched.modules()] == hooks
    assert torch.equal(logits_of(patched, ROWS), expected)
    bank = pa.PrefixBank.for_model(patched)
    bank.add("other", random_parts(bank, TASKS["all"], 0))
    pa.patch(patched, bank)
    assert (logits_of(patched, ["other"] * 6)[0] - expected[0]).abs().max() < TOLERANCE
    with pytest.raises(pa.UnknownTask, match="other"):
        logits_of(patched, ROWS)


def test_save_pretrained_saves_the_plain_model(patched: Any, tmp_path: Path) -> None:
    patched.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    pa.unpatch(patched)
    assert torch.equal(logits_of(again, None), logits_of(patched, None))


def test_two_patched_models_take_turns() -> None:
    models = [tiny_seq2seq(family) for family in ("t5", "bart")]
    for model in models:
        pa.patch(model, make_bank(model))
    calls = [(model, tasks) for model in models for tasks in (ROWS, None, ["decoder"] * 6)]
    alone = [logits_of(*call) for call in calls]
    for i in (3, 0, 4, 1, 5, 2):
        assert torch.equal(logits_of(*calls[i]), alone[i])
    pa.unpatch(models[0])
    assert torch.equal(logits_of(*calls[3]), alone[3])


def test_two_threads_with_different_tasks(patched: Any) -> None:
    inputs = make_inputs(patched)
    calls: dict[str, dict[str, Any]] = {"mixed": {"task_ids": ROWS}, "one": {"task_ids": ["all"] * 6}, "none": {}}
    wanted = {name: patched.generate(**inputs, **GREEDY, **options) for name, options in calls.items()}
    assert wrong_in_threads(lambda name: patched.generate(**inputs, **GREEDY, **calls[name]), wanted) == []
