"""``prefix-attn demo`` says what it must; its timings are not judged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from prefix_attn.cli import demo
from prefix_attn.cli import example as example_module
from prefix_attn.cli.example import ANSWERS, Comparison, Peft, Reply, ShippedExample, alternate, by_task
from prefix_attn.cli.models import load_model, load_tokenizer
from prefix_attn.errors import PrefixAttnError
from tests.cli.conftest import Run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A tenth of the held-out prompts, and one turn of timing."""
    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr(ShippedExample, "questions", property(lambda self: all_questions(self)[:60]))
    return monkeypatch


all_questions = ShippedExample.__dict__["questions"].func


def cells(result: Result) -> list[list[str]]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_whole_demo(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "REPEATS", 1)
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    rows = cells(result)
    for task, answer in ANSWERS.items():
        assert [task, "hot tea", answer, "yes"] in rows
    (none,) = [row for row in rows if row[0] == "(none)"]
    assert none[3] == "not judged: the base was never taught to answer without an instruction"
    accuracy = {row[0]: row[1:] for row in rows if row[-1] == "0%"}
    assert accuracy.keys() == ANSWERS.keys()
    assert [row[1] for row in accuracy.values()] == ["98%", "97%", "99%", "100%", "100%", "100%"]
    assert ["verdict", "equal"] in rows
    assert ["rows with the same tokens", "607 of 607"] in rows
    assert ["generate calls", "1", "6"] in rows
    assert ["bytes of prefix", "98,304", "1,572,864"] in rows
    assert re.search(r"tokens/s *│ *[\d,]+ │ *[\d,]+ │", result.stdout)
    assert "96 rows, 16 a task, 16 new tokens a row" in result.stdout


def test_without_peft_the_demo_says_so(run: Run, quick: pytest.MonkeyPatch) -> None:
    quick.setattr(demo, "find_spec", lambda name: None)
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert "pip install 'prefix-attn[peft]'" in result.stdout
    assert "verdict" not in result.stdout
    assert re.search(r"tokens/s *│ *[\d,]+ │ *│", result.stdout)


def test_a_wrong_answer_is_shown_and_fails(run: Run, quick: pytest.MonkeyPatch) -> None:
    quick.setitem(ANSWERS, "sort", "something else")
    result = run("demo")
    assert result.exit_code == 1
    assert ["sort", "hot tea", "aehott", "no, expected something else"] in cells(result)


def test_a_difference_from_peft_is_shown_and_fails(run: Run, quick: pytest.MonkeyPatch) -> None:
    ask = Peft.ask
    quick.setattr(Peft, "ask", lambda self, rows: [*ask(self, rows)[:-1], Reply("?", [5], torch.zeros(1, 69))])
    result = run("demo")
    assert result.exit_code == 1
    assert ["verdict", "NOT EQUAL"] in cells(result)
    assert ["rows with the same tokens", "66 of 67"] in cells(result)


def test_bytes_are_those_that_peft_puts_into_its_caches(example: ShippedExample) -> None:
    model = load_model(example.model)
    peft = Peft(model, load_tokenizer(example.model), example.adapters)
    tasks = [question.task for question in example.first_of_each(16)]
    held = 0
    for task, rows in by_task(tasks).items():
        peft.model.set_adapter(task)
        cache = peft.model.get_prompt(batch_size=len(rows))
        held += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 1_572_864


def reply(tokens: list[int], logit: float = 1.0) -> Reply:
    return Reply("", tokens, torch.full((len(tokens), 4), logit))


def test_comparison_stops_at_the_first_other_token() -> None:
    ours = [reply([1, 2, 3]), reply([1])]
    theirs = [Reply("", [1, 5, 3], torch.tensor([[1.0] * 4, [1.5] * 4, [9.0] * 4])), reply([1])]
    found = Comparison.of(ours, theirs)
    assert (found.rows, found.equal, found.difference, found.largest) == (2, 1, 0.5, 9.0)
    assert not found.passed
    assert Comparison.of(ours, ours).passed
    assert not Comparison.of([reply([1])], [reply([1], 1.001)]).passed


def test_alternate_times_by_turns_and_within_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    runs = [lambda: turns.append("a"), lambda: turns.append("b")]
    assert [len(seconds) for seconds in alternate(runs, 3, limit=60.0)] == [3, 3]
    assert "".join(turns) == "abababab"
    assert [len(seconds) for seconds in alternate(runs, 3, limit=-1.0)] == [1, 1]


def test_missing_files_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> None:
    monkeypatch.setattr(example_module, "files", lambda name: tmp_path)
    with pytest.raises(PrefixAttnError, match="string_tasks: the example's files are missing"):
        ShippedExample.found()
    assert run("demo").exit_code == 2
