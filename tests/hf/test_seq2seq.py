"""Encoder-decoder models against PEFT and against a replicated prefix, row by row; and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prefix_attn as pa
from tests.bank.models import quiet_peft
from tests.bank.test_seq2seq import peft_prefix
from tests.hf.seq2seq_replica import replicated
from tests.seq2seq import SEQ2SEQ, SOME, random_parts, tiny_seq2seq

TOLERANCE = 1e-5
GREEDY = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
#: Tokens of the prefix in each part.
TASKS: dict[str, dict[str, int]] = {
    "all": {"decoder": 5, "encoder": 3, "cross": 9}, "decoder": {"decoder": 7}, "encoder": {"encoder": 12},
    "cross": {"cross": 4},
}  # fmt: skip
ROWS = ["all", None, "encoder", "decoder", "cross", "all"]


def make_inputs(model: Any, rows: int = len(ROWS)) -> dict[str, Tensor]:
    """Tokens padded on the right by another amount in each row, the last on the left; or sound."""
    rng = torch.Generator().manual_seed(0)
    if model.config.model_type == "whisper":
        return {"input_features": torch.randn(rows, 8, 24, generator=rng)}
    ids = torch.randint(3, 99, (rows, 9), generator=rng)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, 9 - row :] = 0
    mask[-1] = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1])
    return {"input_ids": ids * mask, "attention_mask": mask}


def decoder_tokens(rows: int = len(ROWS), length: int = 6) -> Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(1))


def one_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: x[row : row + 1] for name, x in inputs.items()}


def make_bank(model: Any) -> pa.PrefixBank:
    bank = pa.PrefixBank.for_model(model)
    for seed, (name, lengths) in enumerate(TASKS.items()):
        bank.add(name, random_parts(bank, lengths, seed))
    return bank


@pytest.fixture(params=SOME)
def patched(request: pytest.FixtureRequest) -> Any:
    model = tiny_seq2seq(request.param)
    return pa.patch(model, make_bank(model))


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Plain generate: Whisper's own also cuts and pads what it returns."""
    from transformers import GenerationMixin

    plain = GenerationMixin.generate if "input_features" in inputs and "task_ids" not in options else None
    return model.generate(**inputs, **options) if plain is None else plain(model, **inputs, **options)


def assert_same_generation(ours: Any, row: int, theirs: Any) -> None:
    length = theirs.sequences.shape[1]
    assert torch.equal(ours.sequences[row, :length], theirs.sequences[0])
    for step, logits in enumerate(theirs.logits):
        assert (ours.logits[step][row] - logits[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_every_part_equals_a_replicated_prefix(family: str) -> None:
    patched = tiny_seq2seq(family)
    pa.patch(patched, make_bank(patched))
    inputs, tokens = make_inputs(patched), decoder_tokens()
    with torch.no_grad():
        logits = patched(**inputs, decoder_input_ids=tokens, task_ids=ROWS).logits
        ours = patched.generate(**inputs, **GREEDY, task_ids=ROWS)
        plain = tiny_seq2seq(family)
        for row, task in enumerate(ROWS):
            seed = list(TASKS).index(task) if task else 0
            parts = random_parts(patched._prefix_attn.bank, TASKS[task] if task else {}, seed)
            with replicated(plain, parts) as model:
                theirs = model(**one_row(inputs, row), decoder_input_ids=tokens[row : row + 1]).logits
                assert (logits[row] - theirs[0]).abs().max() < TOLERANCE
                assert_same_generation(ours, row, generate(model, one_row(inputs, row), **GREEDY))


@pytest.fixture(scope="module", params=[family for family in SEQ2SEQ if family != "whisper"])
def with_peft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A patched model whose bank was loaded from adapters as PEFT saved them, and PEFT's models by task."""
    with warnings.catch_warnings():
        quiet_peft()
        tuned = {f"m{m}": peft_prefix(tiny_seq2seq(request.param), m).eval() for m in (3, 8)}
        model = tiny_seq2seq(request.param)
        bank = pa.PrefixBank.for_model(model)
        for name, peft_model in tuned.items():
            folder: Path = tmp_path_factory.mktemp(request.param)
            peft_model.save_pretrained(folder)
            bank.load(name, folder)
    return pa.patch(model, bank, verify=True), tuned | {None: tiny_seq2seq(request.param)}


PEFT_ROWS = ["m3", None, "m8", "m3"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_equals_peft(with_peft: Any) -> None:
    model, peft = with_peft
    inputs, tokens = make_inputs(model, len(PEFT_ROWS)), decoder_tokens(len(PEFT_ROWS))
    beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=tokens, task_ids=PEFT_ROWS).logits
    greedy = model.generate(**inputs, **GREEDY, task_ids=PEFT_ROWS)
    searched = model.generate(**inputs, **beams, task_ids=PEFT_ROWS)
    for row, task in enumerate(PEFT_ROWS):
        one = one_row(inputs, row)
        with torch.no_grad():
            theirs = peft[task](**one, decoder_input_ids=tokens[row : row + 1]).logits
        assert (logits[row] - theirs[0]).abs().max() < TOLERANCE
        assert_same_generation(greedy, row, peft[task].generate(**one, **GREEDY))
        theirs = peft[task].generate(**one, **beams)
        assert torch.equal(searched[2 * row : 2 * row + 2, : theirs.shape[1]], theirs)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_sampling_draws_the_same_tokens_as_peft(with_peft: Any) -> None:
    model, peft = with_peft
    inputs, options = make_inputs(model, 3), {"max_new_tokens": 6, "do_sample": True, "top_k": 0}
    torch.manual_seed(1)
    ours = model.generate(**inputs, **options, task_ids=["m8"] * 3)
    torch.manual_seed(1)
    assert torch.equal(ours, peft["m8"].generate(**inputs, **options))


def test_caches_do_not_matter(patched: Any) -> None:
    inputs = make_inputs(patched)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = patched.generate(**inputs, **options, task_ids=ROWS)
    for other in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(patched.generate(**inputs, **options, **other, task_ids=ROWS), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", SOME)
def test_without_task_ids_nothing_changes(family: str, attention: str) -> None:
    """Bits, not tolerances; a mask with holes too, which tasks would not allow. And nothing is left behind."""
    model = tiny_seq2seq(family)
    model.set_attn_implementation(attention)
    inputs, tokens = make_inputs(model), decoder_tokens()
    if "attention_mask" in inputs:
        inputs["attention_mask"][:, 4] = 0

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            return [
                model(**inputs, decoder_input_ids=tokens).logits,
                model.generate(**inputs, max_new_tokens=5, num_beams=2),
                model.generate(**inputs, max_new_tokens=5, do_sample=False, cache_implementation="static"),
            ]

    def traces() -> list[Any]:
        return [(name, sorted(module.__dict__), id(getattr(module, "config", None)), len(module._forward_hooks),
                 len(module._forward_pre_hooks)) for name, module in model.named_modules()]  # fmt: skip

    before, untouched = outputs(), traces()
    pa.patch(model, make_bank(model))
    while_patched = outputs()
    pa.unpatch(model)
    assert traces() == untouched
    for a, b in zip(before, while_patched, strict=True):
        assert torch.equal(a, b)


def test_copies_work_on_their_own(patched: Any) -> None:
    inputs, tokens = make_inputs(patched), decoder_tokens()
    with torch.no_grad():
        expected = patched(**inputs, decoder_input_ids=tokens, task_ids=ROWS).logits
        for twin in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
            assert torch.equal(twin(**inputs, decoder_input_ids=tokens, task_ids=ROWS).logits, expected)
            for parameter in twin.parameters():
                parameter.zero_()
            assert torch.equal(patched(**inputs, decoder_input_ids=tokens, task_ids=ROWS).logits, expected)
            pa.unpatch(twin)
        assert torch.equal(patched(**inputs, decoder_input_ids=tokens, task_ids=ROWS).logits, expected)


def test_verify_finds_a_difference(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that reads another layer's prefix, as a family with another order of layers would."""
    bank = patched._prefix_attn.bank
    pa.patch(patched, bank, verify=True)
    layer = bank.layer
    monkeypatch.setattr("prefix_attn.hf.part_attention.prefix_attention", lambda q, k, v, prefix, *args, **options: (
        pa.prefix_attention(q, k, v, layer(0, "cross"), *args, **options)
    ))  # fmt: skip
    with pytest.raises(pa.UnsupportedModel, match="differ by"):
        pa.patch(patched, bank, verify=True)


def test_refusals(patched: Any) -> None:
    inputs, tokens = make_inputs(patched), decoder_tokens()
    with pytest.raises(pa.ShapeError, match="6 in all"):
        patched.generate(**inputs, task_ids=["all"] * 5)
    with pytest.raises(pa.ShapeError, match="decoder-only"):
        patched.generate(**inputs, task_ids=ROWS, truncation=True)
    with pytest.raises(pa.UnsupportedModel, match="output_attentions"):
        patched(**inputs, decoder_input_ids=tokens, task_ids=ROWS, output_attentions=True)
    if "attention_mask" in inputs:
        inputs["attention_mask"][2, 3] = 0
        with pytest.raises(pa.UnsupportedModel, match="zeros between"):
            patched(**inputs, decoder_input_ids=tokens, task_ids=ROWS)
    with torch.no_grad():
        inputs = make_inputs(patched)
        cache = patched(**inputs, decoder_input_ids=tokens, task_ids=ROWS).past_key_values
        for others in ({}, {"task_ids": ["decoder"] * 6}):
            with pytest.raises(pa.IncompatiblePrefix, match="computed with tasks"):
                patched(**inputs, decoder_input_ids=tokens[:, :1], past_key_values=cache, **others)
    if patched._prefix_attn.bank.context_limit is not None:
        inputs = make_inputs(patched)
        hook = patched.get_encoder().register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
        with pytest.raises(pa.ContextOverflow, match="row 3: a prefix of 7 tokens and 60 of its own"):
            patched.generate(**inputs, task_ids=[None, None, None, "decoder", None, None], max_new_tokens=60)
        hook.remove()
        with torch.no_grad(), pytest.raises(pa.ContextOverflow, match="row 3"):
            patched(**inputs, decoder_input_ids=decoder_tokens(length=58),
                    task_ids=[None, None, None, "decoder", None, None])  # fmt: skip


def test_whisper_is_refused_where_it_would_run_on_some_of_the_rows() -> None:
    model = tiny_seq2seq("whisper")
    pa.patch(model, make_bank(model))
    sound = make_inputs(model)["input_features"]
    refused: list[tuple[Tensor, dict[str, Any], str]] = [
        (torch.cat([sound, sound], dim=2), {}, "at most 24 frames"), (sound, {"return_timestamps": True}, "timestamps"),
        (sound, {"temperature": (0.0, 0.4)}, "one number"), (sound, {"num_return_sequences": 2}, "not their tasks"),
    ]  # fmt: skip
    for features, options, words in refused:
        with pytest.raises(pa.UnsupportedModel, match=words):
            model.generate(features, task_ids=ROWS, **options)


def test_beams_and_an_encoder_run_apart(patched: Any) -> None:
    """A row's beams all read its prefixes in every part; the encoder's output may be made before."""
    inputs, options = make_inputs(patched), {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    together = patched.generate(**inputs, **options, task_ids=ROWS)
    for row, task in enumerate(ROWS):
        alone = patched.generate(**one_row(inputs, row), **options, task_ids=[task])
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
    with torch.no_grad():
        states = patched.get_encoder()(**inputs, task_ids=ROWS)
        mask = {name: x for name, x in inputs.items() if name == "attention_mask"}
        logits = [patched(**given, decoder_input_ids=decoder_tokens(), task_ids=ROWS).logits
                  for given in (inputs, mask | {"encoder_outputs": states})]  # fmt: skip
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_half_precision(family: str) -> None:
    model = tiny_seq2seq(family).to(torch.bfloat16)
    pa.patch(model, make_bank(model), verify=True)
    inputs, tokens = make_inputs(model), decoder_tokens()
    with torch.no_grad():
        half = model(**inputs, decoder_input_ids=tokens, task_ids=ROWS).logits
        assert half.dtype == torch.bfloat16
        model = tiny_seq2seq(family)
        pa.patch(model, make_bank(model))
        full = model(**inputs, decoder_input_ids=tokens, task_ids=ROWS).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**inputs, decoder_input_ids=tokens, task_ids=ROWS).logits
    for logits in (half, mixed):
        assert (logits - full).abs().max() < 0.1 * full.abs().max()
