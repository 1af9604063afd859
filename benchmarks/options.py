"""Options that several of the commands share, and where they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import record
from .peers.peft import peft_cannot_generate

#: Where the results of a command go unless it is told.
RESULTS = record.ROOT / "benchmarks" / "results"

Out = Annotated[Path, typer.Option(help="folder for results")]
Commit = Annotated[str | None, typer.Option(help="what to call this checkout, if it is without git")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads")]


def here(threads: int, commit: str | None) -> tuple[torch.device, record.Environment]:
    """The device to run on, a GPU if there is one, with so many threads on a CPU; and what rows say of it."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, record.Environment.read(device, commit)


def refuse_without_peft() -> None:
    """End with the reason where PEFT could not be timed."""
    reason = peft_cannot_generate()
    if reason is not None:
        sys.exit(reason)
