"""``prefix-attn train``: from a file of examples to a bank that ``generate`` serves."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefix_attn.bank import PrefixBank
from prefix_attn.cli.example import ShippedExample
from prefix_attn.string_tasks.tasks import TASKS, draw_input, prompt_without_instruction
from tests.cli.conftest import Folder, Run

QUICK = ("--tokens", "8", "--epochs", "2")


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def examples(count: int, name: str) -> list[dict[str, str]]:
    task = next(task for task in TASKS if task.name == name)
    rng = random.Random(0)
    texts = [draw_input(task, rng, held_out=False) for _ in range(count)]
    return [{"task": name, "prompt": prompt_without_instruction(x), "answer": task.solve(x)} for x in texts]


def test_from_examples_to_answers(run: Run, example: ShippedExample, folder: Folder, tmp_path: Path) -> None:
    data = write(tmp_path / "examples.jsonl", examples(400, "vowels"))
    bank = tmp_path / "bank"
    result = run("train", "--model", example.model, "--data", data, "--bank", bank, "--tokens", 8, "--epochs", 8,
                 "--batch-size", 16)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if "vowels" in line).replace("│", " ").split()
    assert row[:2] == ["vowels", "400"]
    assert float(row[3]) < 0.1 < float(row[2])
    losses = [json.loads(line) for line in (bank / "losses.jsonl").read_text().splitlines()]
    assert [loss["epoch"] for loss in losses] == list(range(9))
    assert (bank / "losses.png").read_bytes().startswith(b"\x89PNG")
    folder.adapters = ["--bank", str(bank)]
    folder.ask([{"task": "vowels", "prompt": "hotel>"}, {"task": "vowels", "prompt": "area ai>"}])
    assert folder.generate().exit_code == 0
    assert [answer["text"] for answer in folder.answers()] == ["2", "5"]


def test_a_bank_gets_more_tasks_and_keeps_those_it_has(run: Run, example: ShippedExample, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    adapter = f"up={example.folder / 'adapters' / 'upper'}"
    assert run("bank", "add", bank, adapter, "--model", example.model).exit_code == 0
    before = load_file(bank / "up.safetensors")
    data = write(tmp_path / "examples.jsonl", examples(20, "sort"))
    result = run("train", "--model", example.model, "--data", data, "--bank", bank, *QUICK, "--projection", 0)
    assert result.exit_code == 0, result.stderr
    assert "2 prefixes in" in result.stdout
    after = load_file(bank / "up.safetensors")
    assert all(torch.equal(after[name], x) for name, x in before.items())
    shown = run("bank", "check", bank, "--model", example.model).stdout
    assert [line.replace("│", " ").split()[3] for line in shown.splitlines() if "model" in line and "│" in line] == [
        "peft:upper", "trained",
    ]  # fmt: skip
    again = run("train", "--model", example.model, "--data", data, "--bank", bank, *QUICK)
    assert again.exit_code == 2
    assert "has sort already; give --overwrite" in again.stderr
    again = run("train", "--model", example.model, "--data", data, "--bank", bank, *QUICK, "--overwrite")
    assert again.exit_code == 0, again.stderr
    assert "2 prefixes in" in again.stdout


def test_interrupted(run: Run, example: ShippedExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first epoch left is there, and can be served."""
    data = write(tmp_path / "examples.jsonl", examples(20, "sort"))
    save = PrefixBank.save_into

    def save_then_stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(PrefixBank, "save_into", save_then_stop)
    result = run("train", "--model", example.model, "--data", data, "--bank", tmp_path / "bank", "--tokens", 8)
    assert result.exit_code == 130
    assert "holds the prefixes of the epochs that were finished" in result.stderr
    assert run("bank", "check", tmp_path / "bank", "--model", example.model).exit_code == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"task": "sort", "prompt": "b a>"}', "each a string that is not empty"),
        ('{"task": "sort", "prompt": "b a>", "answer": 3}', "each a string that is not empty"),
        ('["sort"]', "expected a JSON object with task, prompt, answer"),
        ("{", "expected a JSON object"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str, run: Run, example: ShippedExample, tmp_path: Path) -> None:
    data = write(tmp_path / "examples.jsonl", examples(2, "sort"))
    with data.open("a", encoding="utf-8") as file:
        file.write("\n" + line + "\n")
    result = run("train", "--model", example.model, "--data", data, "--bank", tmp_path / "bank")
    assert result.exit_code == 2
    assert "line 4: " in result.stderr
    assert reason in result.stderr
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": "a" * 90}, "a prompt of 91 tokens and an answer of"),
        ({"task": "a/b"}, "name: expected no '/'"),
    ],
)
def test_the_line_of_an_example_that_cannot_be_trained_on(
    changes: dict[str, str], reason: str, run: Run, example: ShippedExample, tmp_path: Path
) -> None:
    good, bad = examples(2, "sort")
    data = tmp_path / "examples.jsonl"
    data.write_text(f"{json.dumps(good)}\n\n{json.dumps(bad | changes)}\n", encoding="utf-8")
    result = run("train", "--model", example.model, "--data", data, "--bank", tmp_path / "bank", *QUICK)
    assert result.exit_code == 2
    assert f"{data}, line 3: {reason}" in result.stderr


def test_no_examples(run: Run, example: ShippedExample, tmp_path: Path) -> None:
    data = write(tmp_path / "examples.jsonl", [])
    result = run("train", "--model", example.model, "--data", data, "--bank", tmp_path / "bank")
    assert result.exit_code == 2
    assert "expected at least one example" in result.stderr


def test_files_of_others_are_safe(run: Run, example: ShippedExample, tmp_path: Path) -> None:
    """A folder that is no bank, the file of examples itself, and tasks that are there in another dtype."""
    other = tmp_path / "model"
    other.mkdir()
    (other / "sort.safetensors").write_text("weights")
    data = write(tmp_path / "losses.jsonl", examples(8, "sort"))
    common = ("train", "--model", example.model, "--data", data, *QUICK)
    result = run(*common, "--bank", other)
    assert result.exit_code == 2
    assert "expected a bank (bank.json), or a new or empty folder" in result.stderr
    assert (other / "sort.safetensors").read_text() == "weights"
    adapter = f"up={example.folder / 'adapters' / 'upper'}"
    assert run("bank", "add", other, adapter, "--model", example.model).exit_code == 2
    (tmp_path / "bank").mkdir()
    inside = write(tmp_path / "bank" / "losses.jsonl", examples(8, "sort"))
    assert run("train", "--model", example.model, "--data", inside, "--bank", tmp_path / "bank").exit_code == 2
    inside.unlink()
    assert run("bank", "add", tmp_path / "bank", adapter, "--model", example.model).exit_code == 0
    before = (tmp_path / "bank" / "up.safetensors").read_bytes()
    result = run(*common, "--bank", tmp_path / "bank", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "bank" / "up.safetensors").read_bytes() == before
    assert run("bank", "check", tmp_path / "bank", "--model", example.model).exit_code == 0


def test_what_cannot_be_trained_is_said_before_the_work(run: Run, example: ShippedExample, tmp_path: Path) -> None:
    for changes, options, reason in (
        ({"task": "a/b"}, (), "line 1: name: expected no '/'"),
        ({"prompt": "\ud800"}, (), "line 1: expected a JSON object"),
        ({}, ("--learning-rate", "0"), "learning_rate: expected None or a positive finite number"),
        ({}, ("--bank", "/proc"), "/proc: expected a bank"),
    ):
        data = write(tmp_path / "examples.jsonl", [examples(1, "sort")[0] | changes])
        result = run("train", "--model", example.model, "--data", data, "--bank", tmp_path / "bank", *options)
        assert result.exit_code == 2, result.exception
        assert reason in result.stderr
        assert not (tmp_path / "bank").exists()


def test_names_are_no_formulas(run: Run, example: ShippedExample, tmp_path: Path) -> None:
    data = write(tmp_path / "examples.jsonl", [x | {"task": "$^$"} for x in examples(8, "sort")])
    result = run("train", "--model", example.model, "--data", data, "--bank", tmp_path / "bank", *QUICK)
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "bank" / "losses.png").is_file()
