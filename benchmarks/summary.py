"""Rows to conclusions: ours against each peer and against the best, geometric mean and worst case."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .peers import OURS
from .record import Environment, Row
from .roofs import busy
from .timing import MAX_SETS

Times = dict[str, float]

#: What rotates through less may be found in the L2 cache of a large GPU: 126 MB in a B200, 60 in an H200.
L2_BYTES = 126_000_000

HOST = "host, us a call"
HOST_TIME = "Times are device times of graph replays; outside a graph a call takes at least the host's time."


@dataclass(frozen=True)
class Comparison:
    """How many times longer another provider takes than ours: above 1, ours is faster."""

    other: str
    points: int
    geometric_mean: float
    worst: float
    worst_at: str

    @classmethod
    def of(cls, other: str, ratios: Sequence[tuple[float, str]]) -> Comparison:
        mean = math.exp(sum(math.log(r) for r, _ in ratios) / len(ratios))
        worst, at = min(ratios)
        return cls(other, len(ratios), mean, worst, at)


def times_by_point(rows: Iterable[Row]) -> dict[str, Times]:
    """Point -> provider -> median microseconds, of rows that carry a time."""
    found: dict[str, Times] = {}
    for row in rows:
        if row.median_us is not None:
            found.setdefault(str(row.point), {})[row.provider] = row.median_us
    return found


def comparisons(points: dict[str, Times]) -> list[Comparison]:
    """Against the best peer of each point, then against each other provider; only where both were timed."""
    names = sorted({name for times in points.values() for name in times} - {OURS})
    peers = [name for name in names if not name.startswith(OURS)]
    ratios: dict[str, list[tuple[float, str]]] = {}
    for label, times in points.items():
        if OURS not in times:
            continue
        best = min((times[name] for name in peers if name in times), default=None)
        if best is not None:
            ratios.setdefault("best peer", []).append((best / times[OURS], label))
        for name in names:
            if name in times:
                ratios.setdefault(name, []).append((times[name] / times[OURS], label))
    order = ["best peer", *peers, *(name for name in names if name.startswith(OURS))]
    return [Comparison.of(name, ratios[name]) for name in order if name in ratios]


def host_times(rows: Iterable[Row]) -> dict[str, float]:
    """Provider -> median over points of the host's microseconds a call; empty on a CPU, which is its own host."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.host_us is not None:
            found.setdefault(row.provider, []).append(row.host_us)
    return {provider: statistics.median(times) for provider, times in found.items()}


def markdown(rows: Sequence[Row], environment: Environment, notes: Sequence[str] = ()) -> str:
    """The summary as a page: conclusions per operation, all times, and what has no time and why."""
    e = environment
    lines = [
        f"# {e.device}, {e.date}",
        "",
        f"Driver {e.driver}; torch {e.torch_version}, CUDA {e.cuda_version}, Triton {e.triton_version}, "
        f"transformers {e.transformers_version}, Python {e.python_version}; commit {e.commit}"
        f"{' with changes' if e.dirty else ''}; clocks and power {e.clocks}.",
        *(line for note in notes for line in ("", f"{note}.")),
        *_busy(rows),
        *_cached(rows),
    ]
    for op in sorted({row.op for row in rows}):
        some = [row for row in rows if row.op == op]
        points = times_by_point(some)
        lines += ["", f"## {op}", "", "Time of the other over ours: above 1, ours is faster.", ""]
        lines += [*_ratios(some, points), "", *_all_times(some, points)]
    untimed: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.median_us is None:
            key = row.provider, f"{row.op}: {row.status}"
            untimed[key] = untimed.get(key, 0) + 1
    if untimed:
        lines += ["", "## Without a time", ""]
        lines += _table(["provider", "status", "points"], [[*key, count] for key, count in untimed.items()])
    return "\n".join(lines) + "\n"


def _busy(rows: Sequence[Row]) -> list[str]:
    """A paragraph for each pair of roofs that shows a busy machine: floors of its points are too high."""
    points: dict[str, set[object]] = {}
    for row in rows:
        if row.roof_bytes_per_s is not None and row.roof_cache_bytes_per_s is not None:
            warning = busy(row.roof_bytes_per_s, row.roof_cache_bytes_per_s)
            if warning is not None:
                points.setdefault(warning, set()).add(row.point)
    measured = len({row.point for row in rows})
    lines = [f"Roofs of {len(some)} of {measured} points: {warning}." for warning, some in points.items()]
    return [part for line in lines for part in ("", line)]


def _cached(rows: Iterable[Row]) -> list[str]:
    """A paragraph that names a GPU's points whose input sets all together may fit its L2 cache."""
    small = [
        f"{row.point} ({1e-6 * row.sets * row.bytes:.0f} MB)"
        for row in rows
        if row.provider == OURS and row.host_us is not None and row.sets and row.sets * row.bytes < L2_BYTES
    ]
    if not small:
        return []
    what = f"Not past the L2 cache, in which inputs may be found, since there are {MAX_SETS} sets at most"
    return ["", f"{what}: {'; '.join(small)}."]


def _ratios(rows: Sequence[Row], points: dict[str, Times]) -> list[str]:
    """A line for each other provider; where the host is another device than the one timed, its time, and ours too."""
    head = ["other", "points", "geometric mean", "worst", "worst at"]
    found = comparisons(points)
    body = [[c.other, c.points, f"{c.geometric_mean:.2f}", f"{c.worst:.2f}", c.worst_at] for c in found]
    host = host_times(rows)
    if not host:
        return _table(head, body)
    body = [[OURS, sum(OURS in times for times in points.values()), "-", "-", "-"], *body]
    body = [[*line, f"{host[str(line[0])]:.0f}" if line[0] in host else "-"] for line in body]
    return [HOST_TIME, "", *_table([*head, HOST], body)]


def _all_times(rows: Sequence[Row], points: dict[str, Times]) -> list[str]:
    names = list(dict.fromkeys(row.provider for row in rows if row.median_us is not None))
    floors = {
        str(row.point): f"{row.floor_us:.1f} ({row.fraction_of_floor:.0%})"
        for row in rows
        if row.provider == OURS and row.fraction_of_floor is not None
    }
    body = [
        [label, *(f"{times[name]:.1f}" if name in times else "-" for name in names), floors.get(label, "-")]
        for label, times in points.items()
    ]
    return ["Microseconds per call:", "", *_table(["point", *names, "floor (reached by ours)"], body)]


def _table(head: Sequence[str], body: Sequence[Sequence[object]]) -> list[str]:
    cells = [list(head), *([str(cell) for cell in line] for line in body)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]]
