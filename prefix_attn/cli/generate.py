"""``prefix-attn generate``: answer a file of requests of several tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from prefix_attn.cli import console
from prefix_attn.cli.options import (
    AdapterOption,
    BankOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    named_path,
)
from prefix_attn.cli.requests import Done, Line, OrderedWriter, cut_into_batches, finished, read_lines
from prefix_attn.errors import PrefixAttnError

if TYPE_CHECKING:
    from prefix_attn.cli.answer import Answerer

#: Lines are sorted within this many batches: enough to make even batches, little to repeat after an interruption.
SORTED_BATCHES = 16


def generate(
    model: ModelOption,
    input: Annotated[Path, typer.Option(help="Requests, one JSON object a line.", dir_okay=False, exists=True)],
    output: Annotated[Path, typer.Option(help="Answers, one a line; an unfinished file is continued.")],
    adapter: AdapterOption = None,
    bank: BankOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens for a line that does not say.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Most rows that run together.")] = 32,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = "auto",
    verify: Annotated[bool, typer.Option("--verify", help="First compare each task with a replicated prefix.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start the output anew.")] = False,
) -> None:
    """Answer a file of requests, tasks mixed in every batch; greedy.

    A request is a JSON object with `prompt`, and optionally `task` (absent or null: no prefix) and `max_new_tokens`.
    Other keys are ignored, and the prompt is used as it is: apply a chat template before. BOS is added where neither
    the prompt nor a prefix made of a text begins with it. A model with an encoder reads the prompt there.

        {"task": "sum", "prompt": "Summarise: ...", "max_new_tokens": 64}

    Each answer has `line`, `task`, `prompt`, `max_new_tokens`, and either `text`, `new_tokens` (its end included) and
    `made_by` (a digest of model and prefix), or `error`, in the order of the input. A bad line stops no other. Run an
    interrupted command again to continue it; with another model, dtype, prefix or length that is refused.

        prefix-attn generate --model MODEL \\
            --adapter sum=adapters/sum --adapter cls=adapters/cls \\
            --input requests.jsonl --output answers.jsonl

    Exit code: 0 if every line was answered, 1 if a line failed, 2 if the command could not run, 130 after Ctrl-C.
    """
    adapters = [named_path(text) for text in adapter or []]
    if not adapters and bank is None:
        raise typer.BadParameter("give at least one --adapter NAME=DIR, or a --bank")
    lines = read_lines(input.read_bytes(), max_new_tokens)
    done = Done()
    if output.exists() and output.samefile(input):
        raise typer.BadParameter("--output is the input file")
    if output.is_file() and not overwrite:
        done = finished(output.read_bytes(), lines)
        if done.lines:
            console.err.print(f"Continuing {output} after {done.lines} of {len(lines)} lines.", soft_wrap=True)
    tally = Tally(earlier=done.lines, answered=done.lines - done.failed, failed=done.failed)
    with output.open("ab") as file:  # before loading, so that an output that cannot be written is known at once
        refuse_second_writer(file)
        answerer = load(model, adapters, bank, dtype, device, verify) if done.lines < len(lines) else None
        if answerer is None and lines:
            console.warn(f"{output} is complete, and was not compared with model and prefixes; --overwrite starts anew")
        if answerer is not None:
            answerer.check_made(done.made_by)
        if output.is_file():
            file.truncate(done.size)
        if answerer is not None:
            Job(answerer, lines, OrderedWriter(file, done.lines), tally, batch_size).run()
    console.out.print(tally.table())
    if tally.failed:
        raise typer.Exit(1)


def refuse_second_writer(file: BinaryIO) -> None:
    """Raise `PrefixAttnError` if another process writes to the file, where the file system can tell."""
    from prefix_attn.bank.lock import lock_file

    try:
        lock_file(file, wait=False)
    except BlockingIOError as error:
        raise PrefixAttnError(f"--output: another process is writing to {file.name}; wait for it") from error


@dataclass
class Tally:
    """Lines of the output, those of an earlier run among them; tokens and seconds of generating in this run."""

    earlier: int
    answered: int
    failed: int
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> str:
        return f"{self.tokens / self.seconds:,.0f} tokens/s" if self.seconds else ""

    def table(self) -> Table:
        table = console.table("Summary", "", "", numbers=(1,))
        table.show_header = False
        table.add_row("lines answered", f"{self.answered:,}")
        table.add_row("lines failed", f"{self.failed:,}", style="red" if self.failed else "")
        if self.earlier:
            table.add_row("of them by an earlier run", f"{self.earlier:,}")
        table.add_row("new tokens in this run", f"{self.tokens:,}")
        if self.seconds:
            table.add_row("generating them", f"{self.seconds:.1f} s, {self.rate}")
        return table


def load(
    model_name: str, adapters: list[tuple[str, Path]], folder: Path | None, dtype: Dtype, device: str, verify: bool
) -> Answerer:
    """The patched model, ready to answer."""
    from prefix_attn.cli.answer import Answerer
    from prefix_attn.cli.models import load_bank, load_model, load_tokenizer
    from prefix_attn.hf import patch

    tokenizer, model = load_tokenizer(model_name), load_model(model_name, dtype, device)
    bank = load_bank(model, adapters, folder)
    return Answerer(patch(model, bank, verify=verify), tokenizer, bank)


@dataclass
class Job:
    """The lines from ``writer.next`` on, to be answered in batches."""

    answerer: Answerer
    lines: Sequence[Line]
    writer: OrderedWriter
    tally: Tally
    batch_size: int

    def run(self) -> None:
        """Answer them all; Ctrl-C leaves an output that a later run continues."""
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("lines  {task.fields[rate]}"), TimeRemainingColumn())
        progress = Progress(*columns, console=console.err)
        total = len(self.lines)
        bar = progress.add_task("", total=total, completed=self.writer.next, rate="")
        try:
            with progress:
                for start in range(self.writer.next, total, SORTED_BATCHES * self.batch_size):
                    lines = range(start, min(start + SORTED_BATCHES * self.batch_size, total))
                    for count in self._answer(lines):
                        progress.update(bar, advance=count, rate=self.tally.rate)
        except KeyboardInterrupt:
            console.warn(f"interrupted: {self.writer.next} of {total} lines are written; run the same command again to "
                         "continue")  # fmt: skip
            raise typer.Exit(console.INTERRUPTED) from None

    def _answer(self, lines: range) -> Iterator[int]:
        """Write the outputs of a range of lines; gives how many more are done, again and again."""
        rows = []
        for index in lines:
            try:
                rows.append(self.answerer.row(index, self.lines[index]))
            except PrefixAttnError as error:
                self._fail(index, console.error_line(error))
        yield len(lines) - len(rows)
        bank = self.answerer.bank
        window = None if bank.sliding_window is None else bank.sliding_window.tokens
        for batch in cut_into_batches(rows, self.batch_size, bank.context_limit, window):
            started = perf_counter()
            answers = self.answerer.answer(batch)
            self.tally.seconds += perf_counter() - started
            for row, (text, new_tokens) in zip(batch, answers, strict=True):
                self.writer.add(row.index, self.lines[row.index].output(
                    text=text, new_tokens=new_tokens, made_by=self.answerer.made_by(row.task)))  # fmt: skip
                self.tally.answered += 1
                self.tally.tokens += new_tokens
            yield len(batch)

    def _fail(self, index: int, reason: str) -> None:
        line = self.lines[index]
        self.writer.add(index, line.output(error=reason))
        self.tally.failed += 1
        console.say(f"line {line.number}", "bold red", reason)
