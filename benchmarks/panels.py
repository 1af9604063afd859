"""The style of all figures: titled panels under the device's name, one legend below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

#: Lines of a heat map that a panel's title and axis take.
TITLE_LINES = 3


def panels(
    device: str, titles: Sequence[str], what: str, each: tuple[float, float] = (4.6, 3.5), per_row: int = 2
) -> tuple[Figure, list[Any]]:
    """A figure that says the device and what it shows, with a titled panel for each title."""
    columns = min(per_row, len(titles))
    rows = -(-len(titles) // columns)
    size = max(7.0, each[0] * columns), each[1] * rows + 1.2
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{device}\n{what}", fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(titles) :]:
        axes.remove()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title, fontsize=10)
    return figure, list(grid[: len(titles)])


def stacked_panels(
    device: str, titles: Sequence[str], what: str, lines: Sequence[int], columns: int = 2
) -> tuple[Figure, list[Any], Any]:
    """`panels` as tall as their numbers of lines, the tallest first, each put into the shortest column; and a narrow
    one to their right, for a colour bar."""
    stacks: list[list[int]] = [[] for _ in range(min(columns, len(titles)))]
    heights = [0.0] * len(stacks)
    for i in sorted(range(len(titles)), key=lambda i: -lines[i]):
        shortest = heights.index(min(heights))
        stacks[shortest].append(i)
        heights[shortest] += lines[i] + TITLE_LINES
    size = max(7.0, 5.2 * len(stacks)), 0.25 * max(heights) + 1.0
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{device}\n{what}", fontsize=11)
    found: dict[int, Any] = {}
    outer = figure.add_gridspec(1, len(stacks) + 1, width_ratios=[1.0] * len(stacks) + [0.03])
    for column, stack in enumerate(stacks):
        grid = outer[column].subgridspec(len(stack), 1, height_ratios=[lines[i] + TITLE_LINES for i in stack])
        for place, i in enumerate(stack):
            found[i] = figure.add_subplot(grid[place])
            found[i].set_title(titles[i], fontsize=10)
    return figure, [found[i] for i in range(len(titles))], figure.add_subplot(outer[len(stacks)])


def legend(figure: Figure, *panels: Any, columns: int = 4) -> None:
    """One legend for all panels, below them."""
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def ticks(axes: Any, which: str, at: Sequence[float]) -> None:
    """These values on the axis "x" or "y", written plainly, and no others."""
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(list(at)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_tick_params(labelsize=8)


def log_grid(low: float, high: float, steps: int = 200) -> list[float]:
    """Values from low to high, evenly spread on a logarithmic axis."""
    return [low * (high / low) ** (i / steps) for i in range(steps + 1)]
