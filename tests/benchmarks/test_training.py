"""The benchmark of training runs whole: every way trains, and is scored on each task."""

from __future__ import annotations

import torch
from rich.console import Console

from benchmarks import training
from benchmarks.record import Environment


def test_every_way_is_measured() -> None:
    device = torch.device("cpu")
    rows = training.measure(device, 4, 1, Environment.read(device, "test"))
    assert [row.provider for row in rows] == ["prefix_attn, MLP", "prefix_attn, no MLP", "PEFT, MLP", "PEFT, no MLP"]
    for row in rows:
        assert row.seconds > 0
        assert list(row.accuracy) == [task.name for task in training.TASKS]
        assert all(0 <= percent <= 100 for percent in row.accuracy.values())
    console = Console(width=100)
    with console.capture() as shown:
        console.print(training.table(rows))
    assert "prefix_attn, no MLP" in shown.get()


def test_examples_hold_no_held_out_input() -> None:
    held_out = {text for task in training.TASKS for text in training.held_out_inputs(task, training.HELD_OUT, 0)}
    assert not held_out & {example.prompt.removesuffix(">") for example in training.lines(50)}
