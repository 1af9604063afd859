"""``prefix-attn train``: prefixes for the tasks of a file of examples, in a bank that the other commands take."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from prefix_attn.cli import console
from prefix_attn.cli.options import DeviceOption, Dtype, DtypeOption, ModelOption
from prefix_attn.cli.requests import is_text
from prefix_attn.errors import PrefixAttnError

if TYPE_CHECKING:
    from prefix_attn.training import Example, Trained

LOSSES, FIGURE = "losses.jsonl", "losses.png"


def train(
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="Examples, one JSON object a line.", dir_okay=False, exists=True)],
    bank: Annotated[Path, typer.Option(help="The folder for the prefixes; a bank that is there gets more tasks.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prefix.")] = 16,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that run together, of all tasks.")] = 32,
    projection: Annotated[int, typer.Option(min=0, help="Hidden width of the MLP that makes a prefix; 0: none.")] = 128,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest rate of the cycle; by default 1e-3, without an MLP 1e-2.")
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            min=0, max=0.9, help="Share of each task's examples that are not trained on, and choose the best epoch."
        ),
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the order of the examples, and of the MLPs.")] = 0,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train tasks anew that the bank has.")] = False,
) -> None:
    """Train a prefix for every task in a file of examples, all of them together, on one frozen model.

    An example is a JSON object with `task`, `prompt` and `answer`. Prompts are used as they are: apply a chat template
    before. (BOS is added to those that do not begin with it.) Other keys are ignored.

        {"task": "sum", "prompt": "Summarise: ...", "answer": "..."}

    A prefix starts as the model's own keys and values of some of the task's examples. Of each task some are held out;
    the epoch with the lowest loss on them is kept. After each epoch the bank is written, so that Ctrl-C loses one at
    most.

        prefix-attn train --model MODEL --data examples.jsonl --bank prefixes
        prefix-attn generate --model MODEL --bank prefixes --input requests.jsonl --output answers.jsonl

    Writes the bank and, beside its prefixes, every epoch's losses (`losses.jsonl`) and a figure of them (`losses.png`,
    with matplotlib) of the latest run.

    Exit code: 0, 2 if the command could not run, 130 if it was interrupted.
    """
    lines = read_examples(data)
    examples = list(lines.values())
    from prefix_attn.bank import PrefixBank
    from prefix_attn.bank.format import INDEX, write_index
    from prefix_attn.bank.lock import only_writer
    from prefix_attn.cli.models import load_bank, load_model, load_tokenizer, tasks_of
    from prefix_attn.training import train as train_prefixes
    from prefix_attn.training.examples import checked_examples
    from prefix_attn.training.loop import check_numbers

    with naming_lines(data, list(lines)):
        checked_examples(examples)
    known = tasks_of(bank)
    taken = sorted(known & {example.task for example in examples})
    if taken and not overwrite:
        raise PrefixAttnError(f"{bank}: has {', '.join(taken)} already; give --overwrite, or another --bank")
    if data.resolve() == (bank / LOSSES).resolve():
        raise typer.BadParameter(f"--data is the file that the losses are written to; copy it out of {bank}")
    check_numbers(tokens, epochs, batch_size, held_out, learning_rate)
    tokenizer, loaded = load_tokenizer(model), load_model(model, dtype, device)
    stored = load_bank(loaded, [], bank if known else None)
    bank.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=bank):  # a folder that cannot be written to is known before the work
        pass
    with only_writer(bank):
        if not (bank / INDEX).is_file():
            write_index(bank, {})  # so that what an interruption of the first save leaves is a bank, too

    def save(trained: Trained) -> None:
        trained_bank = PrefixBank(stored.base)
        trained.add_to(trained_bank)
        trained_bank.save_into(bank)
        (bank / LOSSES).write_text("".join(json.dumps(vars(loss)) + "\n" for loss in trained.losses))

    try:
        with naming_lines(data, list(lines)):
            trained = train_prefixes(
                loaded, tokenizer, examples, tokens=tokens, projection=projection or None, epochs=epochs,
                batch_size=batch_size, learning_rate=learning_rate, held_out=held_out, seed=seed, after_epoch=save,
            )  # fmt: skip
    except KeyboardInterrupt:
        console.warn(f"interrupted: {bank} holds the prefixes of the epochs that were finished, if any")
        raise typer.Exit(console.INTERRUPTED) from None
    draw_losses(trained, bank)
    console.out.print(table(trained, examples))
    there = len(tasks_of(bank))
    count = f"{there} prefix{'' if there == 1 else 'es'}"
    console.out.print(Text(f"{count} in {bank}. Answer requests with\n  prefix-attn generate --model {model} --bank "
                           f"{bank} --input requests.jsonl --output answers.jsonl"), soft_wrap=True)  # fmt: skip


def read_examples(path: Path) -> dict[int, Example]:
    """The examples of a file, by the number of their line; empty lines are none.

    Raises:
        PrefixAttnError: a line is no example; names it. Nothing is left out.
    """
    from prefix_attn.training import Example

    names = [field.name for field in fields(Example)]
    examples = {}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PrefixAttnError(f"{path}, line {number}: expected a JSON object ({error})") from error
        values: list[Any] = [content.get(name) for name in names] if isinstance(content, dict) else [None]
        if not all(is_text(value) and value for value in values):
            raise PrefixAttnError(f"{path}, line {number}: expected a JSON object with {', '.join(names)}, each a "
                                  f"string that is not empty, got {line.decode(errors='replace')[:80]}")  # fmt: skip
        examples[number] = Example(*values)
    if not examples:
        raise PrefixAttnError(f"{path}: expected at least one example, got none")
    return examples


@contextmanager
def naming_lines(path: Path, numbers: Sequence[int]) -> Iterator[None]:
    """Within, an error of the i-th example is one of its line."""
    try:
        yield
    except PrefixAttnError as error:
        if found := re.match(r"examples\[(\d+)\]", str(error)):
            rest = str(error)[found.end() :]
            raise PrefixAttnError(f"{path}, line {numbers[int(found[1])]}{rest}") from error
        raise


def draw_losses(trained: Trained, folder: Path) -> None:
    """A figure of the losses, if matplotlib is there."""
    if find_spec("matplotlib") is None:
        console.warn("no figure of the losses: install matplotlib")
        return
    from prefix_attn.training.plot import plot_losses

    plot_losses(trained.losses, folder / FIGURE)


def table(trained: Trained, examples: list[Example]) -> Table:
    """The losses before and after, by task."""
    counts = Counter(example.task for example in examples)
    title = "Loss on held-out examples, nats a token"
    shown = console.table(title, "task", "examples", "at the start", "at best", "epoch", numbers=range(1, 5))
    starts = {loss.task: loss for loss in trained.losses if loss.epoch == 0}
    for task, best in trained.best.items():
        cells = ["" if x.held_out is None else f"{x.held_out:.3f}" for x in (starts[task], best)]
        shown.add_row(Text(task), f"{counts[task]:,}", *cells, str(best.epoch))
    return shown
