"""``prefix-attn generate`` and ``prefix-attn bank`` with encoder-decoder models: tiny T5 and BART, adapters of PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

from prefix_attn.bank import PrefixBank
from prefix_attn.string_tasks.characters import build_tokenizer
from tests.bank.models import quiet_peft
from tests.bank.test_seq2seq import peft_prefix
from tests.cli.conftest import Folder, Run
from tests.seq2seq import random_parts, tiny_seq2seq

PROMPTS = ("hot tea>", "a>", "some longer words>")
TASKS = {"m3": 3, "m8": 8, None: 0}


@pytest.fixture(params=["t5", "bart"])
def checkpoint(request: pytest.FixtureRequest, folder: Folder, tmp_path: Path) -> Folder:
    """A model, its tokenizer and two adapters on disk; the checkpoint asks for beams."""
    options: dict[str, Any] = {"vocab_size": 69, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = tiny_seq2seq(request.param, **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name and "shared" not in name:
                weight.mul_(2.0)  # or every answer is one letter
    model.generation_config.update(num_beams=4, early_stopping=True, length_penalty=2.0)
    folder.model = str(tmp_path / "model")
    model.save_pretrained(folder.model)
    build_tokenizer().save_pretrained(folder.model)
    folder.adapters = []
    with warnings.catch_warnings():
        quiet_peft()
        for name, tokens in TASKS.items():
            if name is not None:
                peft_prefix(AutoModelForSeq2SeqLM.from_pretrained(folder.model), tokens).save_pretrained(
                    tmp_path / name
                )
                folder.adapters.append(f"--adapter={name}={tmp_path / name}")
    return folder


def answers_of_peft(folder: Folder, tmp_path: Path) -> list[str]:
    """Each prompt alone under each task, greedily."""
    tokenizer, texts = build_tokenizer(), []
    for name in TASKS:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder.model)
        model.generation_config.update(num_beams=1, early_stopping=None, length_penalty=None)
        with warnings.catch_warnings():
            quiet_peft()
            tuned = model if name is None else PeftModel.from_pretrained(model, tmp_path / name)
            for prompt in PROMPTS:
                ids = torch.tensor([tokenizer(prompt)["input_ids"]])
                tokens = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
                texts.append(tokenizer.decode(tokens[0, 1:], skip_special_tokens=True))
    return texts


def test_a_mixed_batch_gives_what_peft_gives_alone(
    checkpoint: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint.ask([{"task": task, "prompt": prompt} for task in TASKS for prompt in PROMPTS])
    result = checkpoint.generate("--max-new-tokens", 9, "--verify")
    assert result.exit_code == 0, result.stderr
    expected = answers_of_peft(checkpoint, tmp_path)
    assert len(set(expected)) > len(TASKS), "tasks and prompts make a difference"
    assert [answer["text"] for answer in checkpoint.answers()] == expected
    assert "not valid" not in capfd.readouterr().err


def test_a_bank_of_prefixes_in_all_parts(checkpoint: Folder, tmp_path: Path, run: Run) -> None:
    bank = PrefixBank.for_model(AutoModelForSeq2SeqLM.from_pretrained(checkpoint.model))
    bank.add("all", random_parts(bank, {"decoder": 2, "encoder": 5, "cross": 7}))
    bank.save_pretrained(tmp_path / "bank")
    result = run("bank", "add", tmp_path / "bank", f"m3={tmp_path / 'm3'}", "--model", checkpoint.model)
    assert result.exit_code == 0, result.stderr
    rows = [" ".join(line.replace("│", " ").split()) for line in result.stdout.splitlines()]
    assert any(row.startswith("all 2 decoder + 5 encoder + 7 cross ") for row in rows), rows
    assert any(row.startswith("m3 3 decoder ") for row in rows), rows
    assert any(row.startswith("total 17 ") for row in rows), rows
    assert run("bank", "check", tmp_path / "bank", "--model", checkpoint.model).exit_code == 0
    checkpoint.ask([{"task": task, "prompt": PROMPTS[0]} for task in ("all", "m3", None)])
    with_adapters = checkpoint.generate()
    assert with_adapters.exit_code == 1
    assert "expected one of ['m3', 'm8']" in with_adapters.stderr
    by_adapter = checkpoint.answers()
    checkpoint.adapters = ["--bank", str(tmp_path / "bank")]
    assert checkpoint.generate("--overwrite").exit_code == 0
    of_all, *others = checkpoint.answers()
    assert others == by_adapter[1:]
    assert of_all["text"] not in [answer["text"] for answer in others]
    assert run("bank", "remove", tmp_path / "bank", "all").exit_code == 0


def test_what_does_not_fit_fails_alone(checkpoint: Folder) -> None:
    """BART: 64 positions in the encoder, and 64 in the decoder, of which the start and a prefix of 8 take nine."""
    lines = [("m8", "a" * 62 + ">", 5), ("m8", "a" * 64 + ">", 5), ("m8", "a>", 56), ("m8", "a>", 57)]
    checkpoint.ask([{"task": task, "prompt": prompt, "max_new_tokens": new} for task, prompt, new in lines])
    result = checkpoint.generate()
    answers = checkpoint.answers()
    if "bart" in AutoModelForSeq2SeqLM.from_pretrained(checkpoint.model).config.model_type:
        assert result.exit_code == 1
        assert ["text" in answer for answer in answers] == [True, False, True, False]
        assert answers[1]["error"] == "prompt: 66 tokens exceed the encoder's 64 positions; shorten the prompt"
        assert answers[3]["error"] == (
            "prompt: a start token, a prefix of 8 and 57 new tokens exceed the decoder's 64 positions; lower "
            "max_new_tokens to 56"
        )
    else:
        assert result.exit_code == 0, result.stderr
