"""The matrix: every mode of generate on six families, row by row against PEFT with that row's task alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import prefix_attn as pa
from tests.hf.conftest import LENGTHS, TASKS, padded_inputs
from tests.hf.families import tiny_model
from tests.hf.modes import MODES, Mode
from tests.hf.peft_oracle import PeftOracle

GUIDE = Path(__file__).parents[2] / "docs/modes.md"
BASE: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_oss")
SAMPLING: dict[str, dict[str, Any]] = {
    "sampling": {"top_k": 0},
    "nucleus": {"top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
    "return sequences": {"num_return_sequences": 2},
    "beams": {"num_beams": 3},
}


@pytest.fixture(scope="module", params=FAMILIES)
def peft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftOracle:
    return PeftOracle(request.param, tmp_path_factory.mktemp(request.param), LENGTHS)


@pytest.fixture(scope="module")
def patched(peft: PeftOracle) -> Any:
    """The patched model, its bank loaded from what PEFT saved."""
    model = tiny_model(peft.family)
    bank = pa.PrefixBank.for_model(model)
    for name, path in peft.paths.items():
        bank.load(name, path)
    return pa.patch(model, bank)


def row(inputs: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {name: x[i : i + 1] for name, x in inputs.items()}


def ours(model: Any, mode: Mode, inputs: dict[str, torch.Tensor], tasks: list[str | None]) -> torch.Tensor:
    return model.generate(**(inputs | BASE | mode.options(model, inputs["input_ids"])), task_ids=tasks)


@pytest.mark.parametrize("name", MODES)
def test_mode_equals_peft(patched: Any, peft: PeftOracle, name: str) -> None:
    mode, inputs = MODES[name], padded_inputs()
    if mode.families and peft.family not in mode.families:
        pytest.skip(f"transformers has no {name} for {peft.family}")
    rows = (0, 3) if mode.one_row else range(len(TASKS))
    batch = None if mode.one_row else ours(patched, mode, inputs, TASKS)
    for i in rows:
        alone = row(inputs, i)
        got = ours(patched, mode, alone, [TASKS[i]]) if batch is None else batch.unflatten(0, (len(TASKS), -1))[i]
        options = mode.options(peft.base(TASKS[i]), alone["input_ids"]) if mode.peft is None else mode.peft
        expected = peft.generate(TASKS[i], **(alone | BASE | options)).sequences
        new = expected[:, 8:]
        got = got[:, 8:] if got.shape[1] > BASE["max_new_tokens"] else got  # inputs_embeds gives new tokens only
        assert torch.equal(got[:, : new.shape[1]], new)
        assert bool((got[:, new.shape[1] :] <= 2).all()), "behind its end a row is padded with special tokens"


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_draws_what_peft_draws(patched: Any, peft: PeftOracle, name: str) -> None:
    """Same seed, same task in all rows: the same numbers are drawn in the same order."""
    inputs = padded_inputs()
    options = {"max_new_tokens": 6, "do_sample": True} | SAMPLING[name]
    torch.manual_seed(1)
    got = patched.generate(**inputs, **options, task_ids=["nine"] * 4)
    torch.manual_seed(1)
    assert torch.equal(got, peft.generate("nine", **inputs, **options).sequences)


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
            expected = peft.generate(task, **row(talk, i), **BASE).sequences[0, 15:]
            assert torch.equal(got[i, : len(expected)], expected)


def test_the_guide_names_every_mode() -> None:
    """And says where PEFT itself fails, as the matrix has it."""
    rows = [line.split("|") for line in GUIDE.read_text().splitlines() if line.startswith("|")]
    for name, mode in MODES.items():
        row = next((row for row in rows if name in row[1].strip()), None)
        assert row is not None, f"docs/modes.md has no row for {name!r}"
        assert ("fails" in row[3]) == (mode.peft is not None), f"docs/modes.md on {name!r}"
