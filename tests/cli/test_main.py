"""The command as a whole: help, version, and how little it imports to show them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

import prefix_attn as pa
from prefix_attn.cli.main import app
from tests.cli.conftest import Run


def commands(group: Any, path: str = "") -> Iterator[str]:
    """The names of all commands, such as "bank add"."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path}{name} ")
        else:
            yield path + name


COMMANDS = [*commands(typer.main.get_command(app))]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str, run: Run) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    below_usage = result.stdout.partition("Usage:")[2].partition("\n")[2]
    assert f"prefix-attn {command}" in below_usage


def test_the_first_help_lists_the_commands(run: Run) -> None:
    for args in ([], ["--help"]):
        output = run(*args).output
        assert "prefix-attn demo" in output
        for name in ("demo", "generate", "doctor", "bank", "bench"):
            assert f" {name} " in output


def test_version(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"prefix-attn {pa.__version__}\n"


def test_the_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "prefix_attn", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"prefix-attn {pa.__version__}\n"


def test_help_imports_neither_transformers_nor_peft() -> None:
    program = "import sys, prefix_attn.cli.main; print({'transformers', 'peft', 'triton'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
