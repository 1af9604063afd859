"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Precisions a model can be loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ModelOption = Annotated[str, typer.Option("--model", help="The base model: a folder, or a name on the Hub.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Precision; auto is that of the checkpoint.")]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="A task, and the folder or Hub name of its PEFT adapter, or its prefix file; repeat for more tasks.",
    ),
]
BankOption = Annotated[
    Path | None,
    typer.Option("--bank", help="A folder of `prefix-attn bank`, or the Hub name of one, for all its tasks."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...; auto takes a GPU.")]


def named_path(text: str) -> tuple[str, Path]:
    """``NAME=DIR`` as a pair."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise typer.BadParameter(f"expected NAME=DIR, for instance sum=adapters/sum, got {text!r}")
    return name, Path(path)
