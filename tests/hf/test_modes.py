"""The matrix: every mode of generate on eight families, row by row against PEFT with that row's task alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import prefix_attn as pa
from tests.hf.conftest import LENGTHS, TASKS, padded_inputs
from tests.hf.families import tiny_model
from tests.hf.modes import MODES, SEQ2SEQ_MODES, Mode
from tests.hf.peft_oracle import PeftOracle
from tests.hf.seq2seq_oracle import Seq2SeqOracle
from tests.hf.test_seq2seq import make_inputs, one_row
from tests.seq2seq import tiny_seq2seq

GUIDE = Path(__file__).parents[2] / "docs/modes.md"
BASE: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
DECODERS = ("llama", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_oss")
ENCODER_DECODERS = ("t5", "bart")
SAMPLING: dict[str, dict[str, Any]] = {
    "sampling": {"top_k": 0},
    "nucleus": {"top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
    "return sequences": {"num_return_sequences": 2},
    "beams": {"num_beams": 3},
}


TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=DECODERS)
def peft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftOracle:
    return PeftOracle(request.param, tmp_path_factory.mktemp(request.param), LENGTHS)


@pytest.fixture(scope="module")
def patched(peft: PeftOracle) -> Any:
    """The patched model, its bank loaded from what PEFT saved."""
    model = tiny_model(peft.family)
    return pa.patch(model, peft.bank(model))


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def seq2seq_oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seq2SeqOracle:
    return Seq2SeqOracle(request.param, tmp_path_factory.mktemp(request.param), LENGTHS, replicated_task="twelve")


@pytest.fixture(scope="module")
def patched_seq2seq(seq2seq_oracle: Seq2SeqOracle) -> Any:
    model = tiny_seq2seq(seq2seq_oracle.family)
    return pa.patch(model, seq2seq_oracle.bank(model))


Oracle = PeftOracle | Seq2SeqOracle


def mode_for(family: str, name: str, modes: dict[str, Mode]) -> Mode:
    mode = modes[name]
    if mode.families and family not in mode.families:
        pytest.skip(f"transformers has no {name} for {family}")
    return mode


def check_mode(mode: Mode, model: Any, oracle: Oracle, inputs: dict[str, torch.Tensor], prompt: int) -> None:
    """Each row of a mixed batch equals the oracle's run of that row alone: tokens, and the numbers they come from.

    Args:
        prompt: tokens that the sequences begin with.
    """
    numbers = {"output_logits": True, "output_scores": True}

    def ours(rows: dict[str, torch.Tensor], tasks: list[str | None]) -> Any:
        options = BASE | mode.options(model, rows["input_ids"]) | numbers
        return model.generate(**(rows | options), task_ids=tasks, return_dict_in_generate=True)

    batch = None if mode.one_row else ours(inputs, TASKS)
    for i in (0, 3) if mode.one_row else range(len(TASKS)):
        alone, task = one_row(inputs, i), TASKS[i]
        got = ours(alone, [task]) if batch is None else batch
        options = mode.options(oracle.base(task), alone["input_ids"]) if mode.peft is None else mode.peft
        expected = oracle.generate(task, **(alone | BASE | options | numbers))
        check_row(got, 0 if batch is None else i, expected, prompt)


def check_row(batch: Any, row: int, alone: Any, prompt: int) -> None:
    """A row of a batch of generated sequences against the same row generated alone."""
    sequences, new = len(alone.sequences), alone.sequences[:, prompt:]
    mine = slice(row * sequences, (row + 1) * sequences)
    got = batch.sequences[mine, prompt:]
    assert torch.equal(got[:, : new.shape[1]], new)
    assert bool((got[:, new.shape[1] :] <= 2).all()), "behind its end a row is padded with special tokens"
    scores = getattr(alone, "sequences_scores", None)
    if scores is not None:
        assert (batch.sequences_scores[mine] - scores).abs().max() < TOLERANCE
        return
    assert alone.logits or not new.numel()  # transformers 5.17 takes the token BART starts with for an end in a lookup
    for step, logits in enumerate(alone.logits):
        assert (batch.logits[step][mine] - logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", MODES)
def test_mode_equals_peft(patched: Any, peft: PeftOracle, name: str) -> None:
    check_mode(mode_for(peft.family, name, MODES), patched, peft, padded_inputs(), prompt=8)


@pytest.mark.parametrize("name", SEQ2SEQ_MODES)
def test_mode_of_an_encoder_decoder(patched_seq2seq: Any, seq2seq_oracle: Seq2SeqOracle, name: str) -> None:
    """Against PEFT; the one task with prefixes in every part against their copies."""
    mode, inputs = mode_for(seq2seq_oracle.family, name, SEQ2SEQ_MODES), make_inputs(patched_seq2seq, len(TASKS))
    check_mode(mode, patched_seq2seq, seq2seq_oracle, inputs, prompt=1)


def check_sampling(model: Any, oracle: Oracle, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    """Same seed, same task in all rows: the same numbers are drawn in the same order."""
    options = {"max_new_tokens": 6, "do_sample": True} | options
    torch.manual_seed(1)
    got = model.generate(**inputs, **options, task_ids=["nine"] * 4)
    torch.manual_seed(1)
    assert torch.equal(got, oracle.generate("nine", **inputs, **options).sequences)


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_draws_what_peft_draws(patched: Any, peft: PeftOracle, name: str) -> None:
    check_sampling(patched, peft, padded_inputs(), SAMPLING[name])


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_of_an_encoder_decoder(patched_seq2seq: Any, seq2seq_oracle: Seq2SeqOracle, name: str) -> None:
    check_sampling(patched_seq2seq, seq2seq_oracle, make_inputs(patched_seq2seq, 4), SAMPLING[name])


def test_mixed_sampling_is_from_each_tasks_distribution(patched: Any, peft: PeftOracle) -> None:
    inputs = padded_inputs(paddings=(0, 0, 0, 0))
    out = patched.generate(
        **inputs, max_new_tokens=6, do_sample=True, top_k=0, task_ids=TASKS, output_logits=True, output_scores=True,
        return_dict_in_generate=True, output_hidden_states=True, eos_token_id=98,
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    assert len(out.scores) == len(out.hidden_states) == 6
    assert out.past_key_values.get_seq_length() == 8 + 5, "the cache holds the request's own tokens"
    for i, task in enumerate(TASKS):
        expected = peft.logits(task, input_ids=out.sequences[i : i + 1])[0, 7:-1]
        assert float((logits[i] - expected).abs().max()) < 1e-5


def test_continuing_a_conversation(patched: Any, peft: PeftOracle) -> None:
    """Two turns on one cache, the second given whole or as its new tokens alone; PEFT answers the whole at once."""
    first = padded_inputs()
    more = torch.randint(3, 99, (4, 4), generator=torch.Generator().manual_seed(1))
    for whole in (True, False):
        cache = DynamicCache(config=patched.config)
        turn = patched.generate(
            **first, max_new_tokens=3, do_sample=False, task_ids=TASKS, past_key_values=cache, eos_token_id=98
        )
        mask = torch.cat([first["attention_mask"], torch.ones(4, 7, dtype=torch.long)], dim=1)
        talk = {"input_ids": torch.cat([turn, more], dim=1), "attention_mask": mask}
        given = talk if whole else {"input_ids": torch.cat([turn[:, -1:], more], dim=1), "attention_mask": mask}
        got = patched.generate(**given, **BASE, task_ids=TASKS, past_key_values=cache)[:, given["input_ids"].shape[1] :]
        for i, task in enumerate(TASKS):
            expected = peft.generate(task, **one_row(talk, i), **BASE).sequences[0, 15:]
            assert torch.equal(got[i, : len(expected)], expected)


@pytest.mark.parametrize(("section", "modes"), [("generate", MODES), ("generate of an encoder-decoder", SEQ2SEQ_MODES)])
def test_the_guide_names_every_mode(section: str, modes: dict[str, Mode]) -> None:
    """And says where PEFT itself fails, as the matrix has it."""
    _, _, rest = GUIDE.read_text().partition(f"\n## {section}\n")
    rows = [line.split("|") for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    for name, mode in modes.items():
        row = next((row for row in rows if name in row[1].strip()), None)
        assert row is not None, f"docs/modes.md has no row for {name!r}"
        assert ("fails" in row[3]) == (mode.peft is not None), f"docs/modes.md on {name!r}"
