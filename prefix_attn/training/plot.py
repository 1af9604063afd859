"""A figure of how the losses of the tasks went. (matplotlib is an extra.)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from prefix_attn.training.loop import Loss

#: Tasks that a legend can name; of more, lines show the spread.
NAMED = 12


def plot_losses(losses: Sequence[Loss], path: Path) -> None:
    """Loss over epochs, a line a task: on held-out examples, or in training where nothing is held out."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    tasks = list(dict.fromkeys(loss.task for loss in losses))
    lines = []
    for task in tasks:
        of_task = [loss for loss in losses if loss.task == task]
        points = [(x.epoch, y) for x in of_task if (y := x.training if x.held_out is None else x.held_out) is not None]
        lines += axes.plot(*zip(*points, strict=True), marker=".")
    axes.set(xlabel="epoch", ylabel="nats a token", yscale="log", title="Loss of answers, held-out where some are")
    axes.grid(alpha=0.3)
    if len(tasks) <= NAMED:
        for text in axes.legend(lines, tasks, fontsize="small").get_texts():
            text.set_parse_math(False)  # names are no formulas
    figure.savefig(path, dpi=150)
