"""Run commands in this process, on the shipped example: a real model, small enough to load anew in every test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from prefix_attn.cli.example import ShippedExample
from prefix_attn.cli.main import app

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _on_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run as they do for users, outside of Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(scope="session")
def example() -> ShippedExample:
    return ShippedExample.found()


@pytest.fixture
def run() -> Run:
    """``run("bank", "list", folder)``: the result of a command, in a wide terminal."""

    def run(*args: str | Path) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "160", "TERM": "dumb"})

    return run


class Folder:
    """A folder with requests and the answers to them."""

    def __init__(self, path: Path, run: Run, example: ShippedExample) -> None:
        self.input = path / "in.jsonl"
        self.output = path / "out.jsonl"
        self._run = run
        self.adapters = [f"--adapter={task}={folder}" for task, folder in example.adapters]
        self.model = example.model

    def generate(self, *options: str | Path) -> Result:
        files = ["--input", self.input, "--output", self.output]
        return self._run("generate", "--model", self.model, *self.adapters, *files, *options)

    def ask(self, requests: Sequence[Any]) -> None:
        self.input.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def folder(tmp_path: Path, run: Run, example: ShippedExample) -> Folder:
    return Folder(tmp_path, run, example)
