"""The sweep itself, on the CPU: every number of chunks is a call of its own, and all give the same result."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import chunks
from benchmarks.peers import Point, Problem
from benchmarks.peers.check import Reference
from benchmarks.tune import launch


@pytest.mark.parametrize("grouped", [False, True])
def test_sweep(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNKS", (1, 3))
    monkeypatch.setattr(chunks, "SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.timing.MAX_SETS", 1)
    point = Point("decode", 3, 1, 70, 40, 2, 1, 16)
    times = chunks.sweep(point, grouped, torch.device("cpu"))
    assert list(times) == ["auto", "1", "3"]
    assert min(times.values()) > 0
    problem = Problem.random(point, torch.device("cpu"), seed=0)
    for count in (None, 1, 3):
        out = launch("grouped" if grouped else "decode", problem, chunks=count)()
        assert Reference.of(problem).check(out, problem)[1] is None


def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = chunks.typer.Typer()
    app.command()(chunks.main)
    result = CliRunner().invoke(app)
    assert result.exit_code == 2
    assert "finds none; nothing was run" in result.output
