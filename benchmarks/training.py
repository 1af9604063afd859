"""Six prefixes for the shipped model, trained together by `prefix_attn.training`, and one after the other by PEFT.

    python -m benchmarks.training        # four minutes; appends to benchmarks/results/<device>/training.jsonl

Every way sees the same examples, as often, in batches of as many rows a task, by AdamW with a one-cycle rate; and is
scored by what its prefixes answer to the 100 held-out prompts of each task, greedily.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich import print
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefix_attn as pa
from prefix_attn.string_tasks.tasks import TASKS, Task, draw_input, held_out_inputs, prompt_without_instruction
from prefix_attn.training import Example, train
from prefix_attn.training.examples import TokenisedExample
from prefix_attn.training.loop import LEARNING_RATE, PROJECTED_LEARNING_RATE, row_losses
from prefix_attn.training.prefixes import PROJECTION

from . import record
from .options import RESULTS, Commit, Out, Threads, here, refuse_without_peft

MODEL = record.ROOT / "examples" / "string_tasks" / "model"
TOKENS, ROWS = 8, 16  # of a prefix; of a task in a batch
HELD_OUT = 100
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class TrainingRow:
    """One way to train all tasks: what it took, and the percentage of held-out prompts it answers, by task."""

    provider: str
    tasks: int
    prefix_tokens: int
    examples: int  # of each task
    epochs: int
    rows: int  # of a task in a batch
    rate: float
    seconds: float
    accuracy: dict[str, float]
    threads: int
    environment: record.Environment


def lines(count: int) -> list[Example]:
    """Training examples of every task; no held-out input is among them."""
    rng = random.Random(0)
    texts = [(task, draw_input(task, rng, held_out=False)) for task in TASKS for _ in range(count)]
    return [Example(task.name, prompt_without_instruction(text), task.solve(text)) for task, text in texts]


class Base:
    """The shipped model and its tokenizer; a fresh model for every way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(MODEL).to(self.device).eval()

    @torch.inference_mode()
    def accuracy(self, task: Task, generate: Callable[..., Any]) -> float:
        """Percentage of held-out prompts that are answered exactly, end included."""
        texts = held_out_inputs(task, HELD_OUT, 0)
        prompts = [prompt_without_instruction(text) for text in texts]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        tokens = generate(**batch.to(self.device), max_new_tokens=ANSWER_TOKENS, do_sample=False)
        said = self.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [answer == task.solve(text) for answer, text in zip(said, texts, strict=True)]
        return 100 * right.count(True) / len(right)


def ours(base: Base, examples: list[Example], epochs: int, projection: int | None) -> tuple[float, dict[str, float]]:
    """All tasks in every batch: seconds, and the accuracies."""
    model = base.model()
    started = time.perf_counter()
    trained = train(
        model, base.tokenizer, examples, tokens=TOKENS, projection=projection, epochs=epochs,
        batch_size=ROWS * len(TASKS), held_out=0,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    bank = pa.PrefixBank.for_model(model)
    trained.add_to(bank)
    pa.patch(model, bank)
    answer = {task.name: partial(model.generate, task_ids=[task.name] * HELD_OUT) for task in TASKS}
    return seconds, {task.name: base.accuracy(task, answer[task.name]) for task in TASKS}


def theirs(base: Base, examples: list[Example], epochs: int, projection: bool) -> tuple[float, dict[str, float]]:
    """PEFT, one task after the other: seconds, and the accuracies."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    total, accuracy = 0.0, {}
    for task in TASKS:
        torch.manual_seed(0)
        config = PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=TOKENS, prefix_projection=projection,
            encoder_hidden_size=PROJECTION,
        )  # fmt: skip
        rows = [example for example in examples if example.task == task.name]
        started = time.perf_counter()
        with warnings.catch_warnings():
            # PEFT asks transformers for an attribute by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(base.model(), config).eval()  # without dropout, of which the model has none
        fit_alone(model, base, rows, epochs, PROJECTED_LEARNING_RATE if projection else LEARNING_RATE)
        total += time.perf_counter() - started
        accuracy[task.name] = base.accuracy(task, model.generate)
    return total, accuracy


def fit_alone(model: Any, base: Base, examples: list[Example], epochs: int, rate: float) -> None:
    """The loop of `prefix_attn.training` for one task, without what many tasks need."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    rows = [
        TokenisedExample.of(i, example, base.tokenizer, base.tokenizer.eos_token_id, None)
        for i, example in enumerate(examples)
    ]
    steps = epochs * -(-len(rows) // ROWS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    rng = random.Random(0)
    with tqdm(total=steps, desc=f"PEFT, {rows[0].task}", mininterval=0.5) as bar:
        for _ in range(epochs):
            rng.shuffle(rows)
            for start in range(0, len(rows), ROWS):
                loss = row_losses(model, rows[start : start + ROWS], base.device).mean()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                bar.update()


def measure(device: torch.device, examples: int, epochs: int, environment: record.Environment) -> list[TrainingRow]:
    """Every way, one after the other."""
    base, data, rows = Base(device), lines(examples), []
    ways: dict[str, tuple[Callable[[], tuple[float, dict[str, float]]], float]] = {
        "prefix_attn, MLP": (lambda: ours(base, data, epochs, PROJECTION), PROJECTED_LEARNING_RATE),
        "prefix_attn, no MLP": (lambda: ours(base, data, epochs, None), LEARNING_RATE),
        "PEFT, MLP": (lambda: theirs(base, data, epochs, True), PROJECTED_LEARNING_RATE),
        "PEFT, no MLP": (lambda: theirs(base, data, epochs, False), LEARNING_RATE),
    }
    for provider, (way, rate) in ways.items():
        seconds, accuracy = way()
        rows.append(TrainingRow(
            provider, len(TASKS), TOKENS, examples, epochs, ROWS, rate, seconds, accuracy, torch.get_num_threads(),
            environment,
        ))  # fmt: skip
    return rows


def table(rows: list[TrainingRow]) -> Table:
    shown = Table("", *(row.provider for row in rows), title="Held-out prompts answered, percent")
    for task in rows[0].accuracy:
        shown.add_row(task, *(f"{row.accuracy[task]:.0f}" for row in rows))
    shown.add_section()
    shown.add_row("mean", *(f"{fmean(row.accuracy.values()):.0f}" for row in rows))
    shown.add_row("seconds", *(f"{row.seconds:.0f}" for row in rows))
    return shown


def main(
    examples: Annotated[int, typer.Option(min=1, help="of each task")] = 1000,
    epochs: Annotated[int, typer.Option(min=1, help="passes over them")] = 10,
    threads: Threads = 2,
    out: Out = RESULTS,
    commit: Commit = None,
) -> None:
    """Train all ways, print a table, and append a JSON line for each to <out>/<device>/training.jsonl."""
    refuse_without_peft()
    device, environment = here(threads, commit)
    rows = measure(device, examples, epochs, environment)
    print(table(rows))
    path = out / environment.slug / "training.jsonl"
    record.append(path, rows)
    print(f"appended to {path}")


if __name__ == "__main__":
    typer.run(main)
