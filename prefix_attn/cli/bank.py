"""``prefix-attn bank``: a folder of prefixes for one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from prefix_attn.cli import console
from prefix_attn.cli.options import Dtype, DtypeOption, ModelOption, named_path
from prefix_attn.errors import IncompatiblePrefix, UnknownTask

if TYPE_CHECKING:
    from prefix_attn.bank import PrefixBank

app = typer.Typer(
    no_args_is_help=True,
    help="Keep a folder of prefixes for one model: list, add, add-text, remove, check.",
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The bank's folder.")]


@app.command("list")
def show(folder: Folder) -> None:
    """List a bank's tasks: prefix tokens, bytes, and where each prefix came from.

    For instance:

        prefix-attn bank list prefixes

    Only the heads of the files are read, and damaged ones shown; `prefix-attn bank check` compares them with a model.
    """
    print_table(folder)


@app.command()
def add(
    folder: Folder,
    adapter: Annotated[
        str, typer.Argument(metavar="NAME=ADAPTER", help="Task; folder or Hub name of a PEFT adapter, or file.")
    ],
    model: ModelOption,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Add a task from a PEFT adapter or a prefix file; makes the bank if there is none.

    For instance:

        prefix-attn bank add prefixes sum=adapters/sum --model MODEL

    The bank gets a copy of the keys and values, in the precision of the model; the adapter stays as it is.
    """
    from prefix_attn.bank.peft import local_adapter
    from prefix_attn.cli.models import load_bank, load_model, tasks_of, warn_if_rounded

    name, path = named_path(adapter)
    path = local_adapter(path)
    existing = folder if tasks_of(folder) else None
    loaded = load_model(model, dtype)
    check_new(name, load_bank(loaded, [], existing))
    bank = load_bank(loaded, [(name, path)])
    warn_if_rounded(path, bank.dtype)
    bank.save_into(folder)  # the files of the others stay as they are
    print_table(folder)


@app.command()
def add_text(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="The task to add.")],
    file: Annotated[typer.FileBinaryRead, typer.Argument(metavar="FILE", help="The text, in UTF-8; - is stdin.")],
    model: ModelOption,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Add a task whose prefix is a text, such as a system prompt; makes the bank if there is none.

    For instance:

        prefix-attn bank add-text prefixes support system_prompt.txt --model MODEL

    The text is used as it is, its last line break included: apply a chat template before. It opens the sequence (with a
    BOS token, where the tokenizer has one; it may begin with it), and `prefix-attn generate` leaves that to it.
    """
    from prefix_attn.cli.models import load_bank, load_model, load_tokenizer, tasks_of

    try:
        text = file.read().removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"expected a text in UTF-8: {error}") from error
    existing = folder if tasks_of(folder) else None
    tokenizer, loaded = load_tokenizer(model), load_model(model, dtype)
    check_new(name, load_bank(loaded, [], existing))
    bank = load_bank(loaded, [])
    bank.add_text(name, tokenizer, text, loaded)
    bank.save_into(folder)
    print_table(folder)


@app.command()
def remove(folder: Folder, name: Annotated[str, typer.Argument(help="The task to remove.")]) -> None:
    """Remove a task and its file.

    For instance:

        prefix-attn bank remove prefixes sum

    The adapter it was made from is not touched.
    """
    from prefix_attn.bank.format import read_index, write_index
    from prefix_attn.bank.lock import only_writer
    from prefix_attn.cli.models import check_bank

    check_bank(folder)
    with only_writer(folder):
        files = read_index(folder)
        if name not in files:
            raise UnknownTask(f"name: expected one of {list(files)}, got {name!r}")
        file = files.pop(name)
        write_index(folder, files)
        (folder / file).unlink(missing_ok=True)
    print_table(folder)


@app.command()
def check(folder: Folder, model: ModelOption) -> None:
    """Load every prefix and make sure that it was made for this model: shape, config and weights.

    For instance:

        prefix-attn bank check prefixes --model MODEL

    Exit code: 0 if all fit, 2 if one does not.
    """
    from prefix_attn.cli.models import load_bank, load_model

    count = len(load_bank(load_model(model), [], folder))
    print_table(folder)
    console.out.print(Text(f"{count} {'prefix fits' if count == 1 else 'prefixes fit'} {model}."), soft_wrap=True)


def check_new(name: str, bank: PrefixBank) -> None:
    """Raise `IncompatiblePrefix` for a task that the bank has."""
    if name in bank:
        raise IncompatiblePrefix(f"name: {name!r} is already in the bank; remove it first")


def print_table(folder: Path) -> None:
    from prefix_attn.cli.models import read_headers

    whole = []
    table = console.table("Prefixes", "task", "tokens", "bytes", "source", "base model", numbers=(1, 2))
    for name, header in read_headers(folder).items():
        if isinstance(header, IncompatiblePrefix):
            table.add_row(Text(name), "", "", Text(str(header), style="red"))
            continue
        whole.append(header)
        cells = (name, in_parts(header.tokens), f"{header.bytes:,}", header.source, header.base)
        table.add_row(*map(Text, cells))
    table.add_section()
    tokens = sum(sum(header.tokens.values()) for header in whole)
    table.add_row("total", f"{tokens:,}", f"{sum(header.bytes for header in whole):,}")
    console.out.print(table)


def in_parts(tokens: dict[str, int]) -> str:
    """Tokens of a prefix; where a model has several parts, by part."""
    if len(tokens) == 1:
        return f"{next(iter(tokens.values())):,}"
    return " + ".join(f"{count:,} {part}" for part, count in tokens.items() if count) or "0"
