"""``prefix-attn demo``: the shipped example, from loading to timing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING

import typer
from rich.progress import track
from rich.table import Table
from rich.text import Text

from prefix_attn.cli import console
from prefix_attn.cli.options import DeviceOption

if TYPE_CHECKING:
    from prefix_attn.bank import PrefixBank
    from prefix_attn.cli.example import Caller, Peft, Reply, ShippedExample

HELD_OUT_BATCH = 60
TIMED_ROWS_PER_TASK, TIMED_TOKENS = 16, 16
REPEATS, TIMING_SECONDS = 5, 12.0


def demo(device: DeviceOption = "auto") -> None:
    """Six string tasks from one small model: one batch, scored, checked against PEFT and timed.

    Needs no network: the model and its six adapters come with the package. With PEFT installed
    (`pip install 'prefix-attn[peft]'`) the same rows run through PEFT too.

        prefix-attn demo

    Exit code: 0 if every row got the answer of its own task and PEFT agrees, 1 if not, 2 if the demo could not run.
    """
    with console.err.status("Loading torch, transformers and the example"):
        from prefix_attn.cli.example import one_thread

        shown = Demo.load(device)
    with one_thread():
        shown.introduce()
        passed = shown.mixed_batch()
        shown.held_out()
        passed &= shown.equality()
        shown.cost()
    if not passed:
        raise typer.Exit(1)


class Demo:
    """The loaded example, and a method for each thing to show; those that can fail say whether they passed."""

    def __init__(self, example: ShippedExample, bank: PrefixBank, patched: Caller, peft: Peft | None) -> None:
        self.example = example
        self.bank = bank
        self.patched = patched
        self.peft = peft
        self.asked: list[tuple[str | None, str]] = []  # task and prompt of each row so far,
        self.replies: list[Reply] = []  # and its reply

    @classmethod
    def load(cls, device: str) -> Demo:
        """Load everything as a user would: transformers' classes, PEFT's folders into a bank, the patch."""
        from transformers.utils import logging

        from prefix_attn.cli.example import Caller, Peft, ShippedExample
        from prefix_attn.cli.models import load_bank, load_model, load_tokenizer
        from prefix_attn.hf import patch

        logging.disable_progress_bar()
        example = ShippedExample.found()
        tokenizer, model = load_tokenizer(example.model), load_model(example.model, device=device)
        bank = load_bank(model, example.adapters)
        patched = Caller(patch(model, bank).generate, tokenizer, model.device)
        has_peft = find_spec("peft") is not None
        peft = Peft(load_model(example.model, device=device), tokenizer, example.adapters) if has_peft else None
        return cls(example, bank, patched, peft)

    def introduce(self) -> None:
        tell(
            f"A small Llama on {self.patched.device.type} and {len(self.bank)} prefixes trained with PEFT. The model "
            "obeys instructions such as 'reverse|'; the prompts below have none, so only a row's prefix says what to "
            "do with its input."
        )

    def ask(self, rows: Sequence[tuple[str | None, str]]) -> list[Reply]:
        """One generate call over rows of any tasks."""
        replies = self.patched.ask([prompt for _, prompt in rows], task_ids=[task for task, _ in rows])
        self.asked += rows
        self.replies += replies
        return replies

    def mixed_batch(self) -> bool:
        """All tasks and a row without one, in one call."""
        from prefix_attn.cli.example import ANSWERS, INPUT

        tasks: list[str | None] = [*ANSWERS, None]
        replies = self.ask([(task, f"{INPUT}>") for task in tasks])
        title = f"One generate call over {len(tasks)} rows: each task, and none"
        table = console.table(title, "task", "input", "answer", "correct")
        passed = True
        for task, reply in zip(tasks, replies, strict=True):
            if task is None:
                remark = "not judged: the base was never taught to answer without an instruction"
                table.add_row("(none)", INPUT, Text(reply.text), remark, style="dim")
                continue
            correct = reply.text == ANSWERS[task]
            passed &= correct
            verdict = Text("yes", "green") if correct else Text(f"no, expected {ANSWERS[task]}", "red")
            table.add_row(task, INPUT, Text(reply.text), verdict)
        show(table)
        return passed

    def held_out(self) -> None:
        """Accuracy on every held-out prompt."""
        questions = self.example.questions
        right: dict[str, list[bool]] = {task: [] for task in self.bank.names}
        batches = [questions[i : i + HELD_OUT_BATCH] for i in range(0, len(questions), HELD_OUT_BATCH)]
        silent = not console.err.is_terminal
        for batch in track(batches, "Held-out prompts", console=console.err, transient=True, disable=silent):
            replies = self.ask([(question.task, question.prompt) for question in batch])
            for question, reply in zip(batch, replies, strict=True):
                right[question.task].append(reply.text == question.answer)
        title = f"Accuracy on {len(questions)} held-out prompts, in mixed batches of {HELD_OUT_BATCH}"
        headings = "task", "prefix tokens", "with prefix", "without prefix and instruction (report.json)"
        table = console.table(title, *headings, numbers=range(1, 4))
        for task, found in right.items():
            accuracy, bare = 100 * sum(found) / len(found), self.example.without_instruction[task]
            table.add_row(task, str(self.bank.prefix_len(task)), f"{accuracy:.0f}%", f"{bare:.0f}%")
        show(table)

    def equality(self) -> bool:
        """Every row so far again with PEFT, one task at a time; passes where there is no PEFT to ask."""
        from prefix_attn.cli.example import Comparison

        if self.peft is None:
            tell("PEFT is not installed, so nothing here is compared with it: pip install 'prefix-attn[peft]'")
            return True
        with console.err.status("The same rows with PEFT"):
            result = Comparison.of(self.replies, self.peft.ask(self.asked))
        verdict = Text("equal", "bold green") if result.passed else Text("NOT EQUAL", "bold red")
        table = console.table(f"The same {result.rows} rows with PEFT, one task at a time", "compared", "result")
        table.add_row("verdict", verdict)
        table.add_row("rows with the same tokens", f"{result.equal} of {result.rows}")
        difference = f"{result.difference:.1e} (largest logit {result.largest:.0f})"
        table.add_row("largest difference of two logits", difference)
        show(table)
        return result.passed

    def cost(self) -> None:
        """Bytes of prefix and tokens/s for one mixed batch."""
        from prefix_attn.cli.example import alternate

        questions = self.example.first_of_each(TIMED_ROWS_PER_TASK)
        tasks, prompts = [question.task for question in questions], [question.prompt for question in questions]
        runs = [lambda: self.patched.work(prompts, TIMED_TOKENS, task_ids=tasks)]
        if self.peft is not None:
            runs.append(partial(self.peft.work, list(zip(tasks, prompts, strict=True)), TIMED_TOKENS))
        with console.err.status("Timing"):
            seconds = alternate(runs, REPEATS, TIMING_SECONDS)
        usage = self.bank.memory_usage
        tokens = len(questions) * TIMED_TOKENS
        place = "one CPU thread" if self.patched.device.type == "cpu" else str(self.patched.device)
        title = f"{len(questions)} rows, {TIMED_ROWS_PER_TASK} a task, {TIMED_TOKENS} new tokens a row, on {place}"
        table = console.table(title, "", "prefix_attn", "PEFT, grouped by task", numbers=(1, 2))
        table.add_row("generate calls", "1", str(len(usage.tasks)))
        table.add_row("bytes of prefix", f"{usage.total:,}", f"{sum(usage.tasks[task] for task in tasks):,}")
        table.add_row("held as", "one copy a task", "one copy a row")
        middle = [f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})" for found in seconds]
        table.add_row(f"seconds, median of {len(seconds[0])}", *middle)
        table.add_row("tokens/s", *(f"{tokens / median(found):,.0f}" for found in seconds))
        show(table)
        tell(
            f"With room to grow and spans padded for the kernels, the bank's tensors take {usage.allocated:,} bytes; "
            "PEFT's bytes are summed over its calls. A model this small spends its time on the fixed costs of each "
            f"call, so the ratio of tokens/s shows what one call instead of {len(usage.tasks)} saves here, not how "
            "fast the kernels are."
        )


def tell(text: str) -> None:
    """A paragraph."""
    console.out.print(Text(text))
    console.out.print()


def show(table: Table) -> None:
    console.out.print(table)
    console.out.print()
