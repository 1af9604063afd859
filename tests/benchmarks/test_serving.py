"""The benchmark of serving runs whole, and gives no time to answers that differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import serving
from benchmarks.record import Environment
from benchmarks.serving import OURS, PEFT, WITHOUT, Answered, Load
from tests.serving.engines import needs_engine

pytestmark = needs_engine


@pytest.fixture
def model() -> Iterator[Any]:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=256, eos_token_id=299)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "LONGEST", 12)
        yield GPT2LMHeadModel(config).eval()


def test_every_way_answers_every_request(model: Any) -> None:
    environment = Environment.read(torch.device("cpu"), "test")
    rows = serving.measure(model, 6, 3, 5, environment)
    assert [(row.provider, row.status) for row in rows] == [(OURS, "ok"), (PEFT, "ok"), (WITHOUT, "ok")]
    for row in rows:
        assert 0 < row.answer_s <= row.seconds
        assert row.tokens_per_s > 0
        assert (row.requests, row.tasks, row.prefix_tokens) == (6, 3, 5)
    assert rows[0].first_token_s is not None
    assert rows[0].first_token_s < rows[0].answer_s
    console = Console(width=120)
    with console.capture() as shown:
        console.print(serving.table(rows))
    assert PEFT in shown.get()


def test_answers_that_differ_carry_no_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Load.theirs

    def wrong(self: Load) -> list[Answered]:
        first, *others = theirs(self)
        return [first._replace(tokens=[*first.tokens[:-1], 7]), *others]

    monkeypatch.setattr(Load, "theirs", wrong)
    rows = serving.measure(model, 4, 2, 5, Environment.read(torch.device("cpu"), "test"))
    assert [row.status for row in rows] == ["ok", f"wrong: 1 of 4 answers are not those of {OURS}", "ok"]
    assert rows[1].seconds == rows[1].answer_s == 0


@pytest.mark.parametrize("refused", ["ours", "theirs"])
def test_a_way_that_cannot_answer(model: Any, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """And PEFT, whose answers nobody can check then, carries no time either."""

    def out_of_memory(self: Load) -> list[Answered]:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Load, refused, out_of_memory)
    ours, peft, without = serving.measure(model, 4, 2, 5, Environment.read(torch.device("cpu"), "test"))
    assert without.status == "ok"
    assert (ours.status == "ok") == (refused == "theirs")
    assert peft.status != "ok"
    assert peft.seconds == 0
