"""Options that several of the commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import record

#: Where the results of a command go unless it is told.
RESULTS = record.ROOT / "benchmarks" / "results"

Out = Annotated[Path, typer.Option(help="folder for results")]
Commit = Annotated[str | None, typer.Option(help="what to call this checkout, if it is without git")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads")]
