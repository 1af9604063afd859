"""The style of all figures: titled panels under the device's name, one legend below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator


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
