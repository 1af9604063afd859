"""Figures, from results files and nothing else: where the project wins, by how much, how near the roof, where it loses.

A ratio is the time of the fastest other provider at a point over ours: above 1, ours is faster than all of them. What
is below 1 lies on red ground.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prefix_attn.errors import PrefixAttnError

from .panels import legend, log_grid, panels, stacked_panels, ticks
from .peers import OURS, Point
from .record import QUICK, GenerationRow, Row, json_lines, read_either

LOSS, WIN, OTHER = "#c0392b", "#2c6fbb", "#8a8a8a"
MIB = 2**20

#: Batch, tasks, own keys, skew and raggedness: a line of a heat map.
Line = tuple[int, int, int, str, bool]

#: Names of head shapes, for titles.
HEADS = {(12, 12, 64): "GPT-2", (32, 8, 128): "Llama-3", (32, 32, 128): "Llama-2", (16, 8, 256): "Gemma-2"}


@dataclass
class Device:
    """All that the files say of one device.

    Attributes:
        ratios: point -> time of the fastest other provider over ours.
        rows: every row of attention that has a time.
    """

    name: str
    slug: str
    rows: list[Row] = field(default_factory=list)
    generated: list[GenerationRow] = field(default_factory=list)

    @cached_property
    def ratios(self) -> dict[Point, float]:
        ours: dict[Point, float] = {}
        others: dict[Point, float] = {}
        for row in self.rows:
            if row.median_us is None:
                continue
            if row.provider == OURS:
                ours[row.point] = row.median_us
            elif not row.provider.startswith(OURS):
                others[row.point] = min(row.median_us, others.get(row.point, row.median_us))
        return {point: others[point] / us for point, us in ours.items() if point in others}


def latest(folder: Path) -> list[Path]:
    """The newest results file of each device, and the one of generation; by when their last run began.

    Those of `--quick` runs are left out: figures of a few points would replace those of the grids.

    Raises:
        PrefixAttnError: there is none.
    """
    found: list[Path] = []
    for device in sorted(path for path in folder.glob("*") if path.is_dir()):
        for generation in (False, True):
            files = [f for f in device.glob("2*-*.jsonl") if f.stem.endswith("-generate") == generation]
            files = [f for f in files if not f.stem.removesuffix("-generate").endswith(QUICK)]
            runs = [(file.name[:10], run, file) for file in files if (run := last_run(file)) is not None]
            found += [file for *_, file in sorted(runs)[-1:]]
    if not found:
        raise PrefixAttnError(
            f"{folder}: expected DEVICE/DATE-COMMIT.jsonl files; make some with `prefix-attn bench all`, "
            "or name files: those of --quick runs are drawn only then"
        )
    return found


def last_run(file: Path) -> str | None:
    """When the run of the file's last row began, UTC; empty for an old row, which does not say, None without a row."""
    try:
        lines = json_lines(file)
    except PrefixAttnError as e:  # another file, or the run before, can be drawn
        warnings.warn(f"passed over: {e}", stacklevel=1)
        return None
    return str(lines[-1][1].get("run", "")) if lines else None


def draw(files: Iterable[Path], folder: Path) -> list[Path]:
    """Every figure that the files have data for, device by device; the paths written.

    Raises:
        PrefixAttnError: no file has a time in it; one is missing, or holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for device in devices(files):
        for name, figure in FIGURES.items():
            made = figure(device)
            if made is not None:
                path = folder / f"{device.slug}-{name}.png"
                made.savefig(path, dpi=130)
                written.append(path)
    if not written:
        raise PrefixAttnError("bench plot: these files hold no time; expected those that `prefix-attn bench` writes")
    return written


def devices(files: Iterable[Path]) -> list[Device]:
    """The rows of all files, by the device they were measured on.

    Raises:
        PrefixAttnError: one is missing, or holds something else.
    """
    found: dict[str, Device] = {}
    for file in files:
        for row in read_either(file):
            if row.environment is None:
                continue
            device = found.setdefault(row.environment.slug, Device(row.environment.device, row.environment.slug))
            if isinstance(row, Row):
                device.rows.append(row)
            else:
                device.generated.append(row)
    return list(found.values())


def against_prefix(device: Device) -> Figure | None:
    """Speed-up over prefix tokens: a line for each number of rows and tasks."""
    points = [p for p in device.ratios if _plain(p) and p.n == _usual_n(device)]
    return _lines(device, points, "m", lambda p: (p.batch, p.tasks), "B={}, T={}", "prefix tokens of a task",
                  "speed-up over prefix length, B rows of T tasks")  # fmt: skip


def against_batch(device: Device) -> Figure | None:
    """Speed-up over rows, all of one task: a line for each prefix length."""
    points = [p for p in device.ratios if _plain(p) and p.tasks == 1 and p.n == _usual_n(device)]
    return _lines(device, points, "batch", lambda p: (p.m,), "prefix of {}", "rows, all of one task",
                  "speed-up over batch size")  # fmt: skip


def against_tasks(device: Device) -> Figure | None:
    """Speed-up over tasks, at the batch size that has most numbers of them: a line for each prefix length."""
    plain = [p for p in device.ratios if _plain(p) and p.n == _usual_n(device)]
    if not plain:
        return None
    batch = max({p.batch for p in plain}, key=lambda b: (len({p.tasks for p in plain if p.batch == b}), b))
    points = [p for p in plain if p.batch == batch]
    return _lines(device, points, "tasks", lambda p: (p.m,), "prefix of {}", f"tasks of {batch} rows",
                  f"speed-up over number of tasks, {batch} rows")  # fmt: skip


def roofline(device: Device) -> Figure | None:
    """Every point: FLOP/s reached over FLOPs a byte that must be moved, a prefix once per task; ours, others, roofs."""
    rows = [r for r in device.rows if r.median_us is not None and r.roof_bytes_per_s is not None]
    rows = [r for r in rows if r.provider == OURS or not r.provider.startswith(OURS)]  # not our own variants
    needed = {row.point: row.bytes for row in rows if row.provider == OURS}
    dtypes = sorted({row.dtype for row in rows if row.point in needed})
    if not dtypes:
        return None
    figure, grid = panels(device.name, dtypes, "reached, and possible", each=(5.4, 4.2))
    for axes, dtype in zip(grid, dtypes, strict=True):
        here = [row for row in rows if row.dtype == dtype and row.point in needed]
        kinds = (("other providers", OTHER, [r for r in here if r.provider != OURS], 9),
                 ("prefix_attn", WIN, [r for r in here if r.provider == OURS], 16))  # fmt: skip
        spread = [row.flops / needed[row.point] for row in here]
        x = [min(spread) / 1.5, max(spread) * 1.5]
        # of several runs, the best measured: what the device can do at least
        roof = max(row.roof_flops_per_s or 0.0 for row in here)
        rates = (("memory", "-", max(row.roof_bytes_per_s or 0.0 for row in here)),
                 ("L2 cache", ":", max(row.roof_cache_bytes_per_s or 0.0 for row in here)))  # fmt: skip
        for name, style, rate in rates:
            at = log_grid(x[0], x[1])
            reachable = [min(rate * i, roof) / 1e9 for i in at]
            axes.plot(at, reachable, style, color="black", lw=1, label=f"roof: {name}, products")
        for name, color, some, size in kinds:
            axes.scatter([r.flops / needed[r.point] for r in some], [r.flops / _us(r) / 1e3 for r in some], size,
                         color, alpha=0.75, lw=0, label=name)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must be moved", ylabel="GFLOP/s reached")
        axes.set_title(f"{dtype}, all suites", fontsize=10)
        steps = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
        ticks(axes, "x", [step for step in steps if x[0] <= step <= x[1]])
        axes.grid(alpha=0.25)
    legend(figure, grid[0])
    return figure


def memory(device: Device) -> Figure | None:
    """Bytes of prefix and peak of generation, over the batch and over the number of tasks."""
    rows = [row for row in device.generated if row.prefix_bytes is not None and row.cache == "dynamic"]
    views = [view for fixed, over in (("tasks", "rows"), ("rows", "tasks")) if (view := _longest(rows, fixed, over))]
    if not views:
        return None
    model = f"{views[0][2][0].model}, {views[0][2][0].dtype}"
    titles = [f"{some[0].prefix_tokens} prefix tokens, {getattr(some[0], fixed)} {fixed}" for fixed, _, some in views]
    figure, grid = panels(device.name, titles, f"memory of generation, {model}", each=(5.4, 4.2))
    for axes, (_, over, some) in zip(grid, views, strict=True):
        for provider, color in ((OURS, WIN), ("peft", OTHER)):
            own = sorted((r for r in some if r.provider.startswith(provider)), key=lambda r: int(getattr(r, over)))
            at = [getattr(r, over) for r in own]
            who = "prefix_attn" if provider == OURS else "PEFT, grouped by task"
            held = ("prefix_bytes", "-o", "prefixes, over the batch"), ("peak_bytes", "--s", "peak, weights aside")
            for name, style, label in held:
                sizes = [(getattr(r, name) or 0) / MIB for r in own]
                axes.plot(at, sizes, style, color=color, ms=5, label=f"{who}: {label}")
        axes.set(xlabel=over, ylabel="MiB", ylim=(0, None))
        axes.set_xscale("log", base=2)
        ticks(axes, "x", sorted({int(getattr(r, over)) for r in some}))
        axes.grid(alpha=0.25)
    legend(figure, grid[0], columns=2)
    return figure


def heat_map(device: Device) -> Figure | None:
    """Every point of the grids as a cell; a cell where another provider is faster is red and framed."""
    ratios = device.ratios
    kinds = sorted({(p.op, p.q_heads, p.kv_heads, p.head_dim, p.dtype) for p in ratios})
    if not kinds:
        return None
    cells = {kind: {_place(p): r for p, r in ratios.items() if _kind(p) == kind} for kind in kinds}
    lines = {kind: sorted({line for line, _ in cells[kind]}) for kind in kinds}
    titles = [f"{op}, {_heads(q, kv, d)} {dtype}" for op, q, kv, d, dtype in kinds]
    what = "time of the fastest other provider over ours, each cell a point"
    figure, grid, side = stacked_panels(device.name, titles, what, [len(lines[kind]) for kind in kinds])
    for axes, kind in zip(grid, kinds, strict=True):
        image = _paint(axes, cells[kind], lines[kind])
    bar = figure.colorbar(image, cax=side, extend="max")
    bar.set_label("framed, below 1: another is faster")
    return figure


def _paint(axes: Any, ratios: Mapping[tuple[Line, int], float], lines: Sequence[Line]) -> Any:
    """One panel of the heat map: a line for each kind of batch, a column for each prefix length; the image."""
    columns = sorted({m for _, m in ratios})
    values = [[ratios.get((line, m), float("nan")) for m in columns] for line in lines]
    norm = TwoSlopeNorm(1.0, 0.0, 4.0)
    image = axes.imshow([[min(v, 4.0) for v in line] for line in values], cmap="RdBu", norm=norm, aspect="auto")
    for (line, m), ratio in ratios.items():
        x, y, lost = columns.index(m), lines.index(line), ratio < 1
        axes.text(
            x, y, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", ha="center", va="center", fontsize=7.5,
            color="white" if ratio < 0.35 or ratio > 3 else "black", fontweight="bold" if lost else "normal",
        )  # fmt: skip
        if lost:
            axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fill=False, edgecolor="black", lw=1.8))
    axes.set_xticks(range(len(columns)), [str(m) for m in columns], fontsize=8)
    axes.set_yticks(range(len(lines)), [_line_label(line) for line in lines], fontsize=7.5)
    axes.set_xlabel("prefix tokens")
    return image


#: Name in the file -> figure.
FIGURES: dict[str, Callable[[Device], Figure | None]] = {
    "prefix": against_prefix, "batch": against_batch, "tasks": against_tasks, "roofline": roofline, "memory": memory,
    "heat-map": heat_map,
}  # fmt: skip


def _lines(
    device: Device, points: Sequence[Point], over: str, group: Callable[[Point], tuple[int, ...]], label: str,
    xlabel: str, what: str,
) -> Figure | None:  # fmt: skip
    """Ratios over one size, a panel for each kind of heads, a line for each group of at least two points."""
    kinds = sorted({_kind(p)[1:] for p in points})
    lines = {kind: _grouped((p for p in points if _kind(p)[1:] == kind), group) for kind in kinds}
    kinds = [kind for kind in kinds if lines[kind]]
    if not kinds:
        return None
    titles = [f"{_heads(q, kv, d)} heads, {dtype}" for q, kv, d, dtype in kinds]
    figure, grid = panels(device.name, titles, f"decode: {what}, against the fastest other provider")
    names = sorted({name for kind in kinds for name in lines[kind]})
    shades = {name: f"C{i}" for i, name in enumerate(names)}
    marks = {name: "osD^vP*X<>"[(i + i // 10) % 10] for i, name in enumerate(names)}  # colours repeat after ten
    ratios = device.ratios
    for axes, kind in zip(grid, kinds, strict=True):
        for name, some in lines[kind].items():
            at = sorted(some, key=lambda p: int(getattr(p, over)))
            x, y = [getattr(p, over) for p in at], [ratios[p] for p in at]
            axes.plot(x, y, f"-{marks[name]}", color=shades[name], ms=5, lw=1.4, label=label.format(*name))
        shown = [p for some in lines[kind].values() for p in some]
        values = [ratios[p] for p in shown]
        low, high = min(0.7, *values) * 0.85, max(1.5, *values) * 1.2
        axes.axhspan(low, 1, color=LOSS, alpha=0.12, lw=0)
        axes.axhline(1, color=LOSS, lw=1)
        axes.annotate("another is faster", (0.985, 0.02), xycoords="axes fraction", ha="right", color=LOSS, fontsize=8)
        axes.set(yscale="log", ylim=(low, high), xlabel=xlabel, ylabel="speed-up")
        axes.set_xscale("log", base=2)
        ticks(axes, "x", sorted({int(getattr(p, over)) for p in shown}))
        ticks(axes, "y", [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low <= t <= high])
        axes.grid(alpha=0.25)
    legend(figure, *grid, columns=5)
    return figure


def _grouped(points: Iterable[Point], group: Callable[[Point], tuple[int, ...]]) -> dict[tuple[int, ...], list[Point]]:
    """Points by group; a single one makes no line."""
    found: dict[tuple[int, ...], list[Point]] = {}
    for point in points:
        found.setdefault(group(point), []).append(point)
    return {name: some for name, some in sorted(found.items()) if len(some) > 1}


def _plain(point: Point) -> bool:
    return point.op == "decode" and point.skew == "even" and not point.ragged


def _usual_n(device: Device) -> int:
    """The number of own keys that most points of decode have."""
    found = [p.n for p in device.ratios if _plain(p)]
    return max(set(found), key=found.count, default=0)


def _kind(point: Point) -> tuple[str, int, int, int, str]:
    return point.op, point.q_heads, point.kv_heads, point.head_dim, point.dtype


def _heads(q_heads: int, kv_heads: int, head_dim: int) -> str:
    name = HEADS.get((q_heads, kv_heads, head_dim), "")
    return f"{name} {q_heads}/{kv_heads}/{head_dim}".strip()


def _place(point: Point) -> tuple[Line, int]:
    """Where a point stands in its heat map: its line, and its prefix length."""
    return (point.batch, point.tasks, point.n, point.skew, point.ragged), point.m


def _line_label(line: Line) -> str:
    batch, tasks, n, skew, ragged = line
    return f"B={batch} T={tasks} n={n}" + f" {skew}" * (skew != "even") + " ragged" * ragged


def _longest(rows: Sequence[GenerationRow], fixed: str, over: str) -> tuple[str, str, list[GenerationRow]] | None:
    """The rows with all else equal that cover most values of ``over``; None if no two do."""
    found: dict[tuple[object, ...], list[GenerationRow]] = {}
    for row in rows:
        found.setdefault((row.model, row.dtype, row.prefix_tokens, row.prompt_tokens, getattr(row, fixed)), []).append(
            row
        )
    best = max(found.values(), key=lambda some: len({getattr(r, over) for r in some}), default=[])
    return (fixed, over, best) if len({getattr(r, over) for r in best}) > 1 else None


def _us(row: Row) -> float:
    assert row.median_us is not None, "only rows with a time are drawn"
    return row.median_us
