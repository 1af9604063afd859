"""A run as tables for a terminal: ratios first, then what they rest on, then what carries no time and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .peers import OURS
from .record import GenerationRow, Row, generation_path
from .run import Outcome
from .summary import HOST, HOST_TIME, Comparison, comparisons, host_times, times_by_point


def everything(outcome: Outcome) -> Iterator[RenderableType]:
    """A table for each suite, geometric means and worst cases, what has no time, what was left out, where it is."""
    for suite, rows in outcome.rows.items():
        yield from _suite(suite, rows)
    if outcome.generated:
        yield _generated(outcome.generated)
    yield from _remarks(outcome)
    if outcome.absent:
        yield Text(f"absent: {'; '.join(outcome.absent)}")
    if outcome.roofs is not None:
        yield Text(str(outcome.roofs))
    if outcome.path is not None:
        paths = [outcome.path] * any(outcome.rows.values()) + [generation_path(outcome.path)] * bool(outcome.generated)
        if paths:
            yield Text(f"rows: {', '.join(map(str, paths))}", no_wrap=True, overflow="ignore")


def ratios(outcome: Outcome) -> Iterator[RenderableType]:
    """Only ratios: a line for each point and peer, then geometric mean and worst case."""
    for suite, rows in outcome.rows.items():
        for point, times in times_by_point(rows).items():
            for peer in (name for name in times if OURS in times and not name.startswith(OURS)):
                yield Text(f"{times[peer] / times[OURS]:6.2f}x  {point}  against {peer}")
        for c in comparisons(times_by_point(rows)):
            if c.other == "best peer":
                yield Text(f"{c.geometric_mean:6.2f}x  {suite}, geometric mean of {c.points} points")
                yield Text(f"{c.worst:6.2f}x  {suite}, worst, at {c.worst_at}")
    for ours, theirs in _pairs(outcome.generated):
        if ours.decode_tokens_per_s is not None and theirs.decode_tokens_per_s is not None:
            ratio = ours.decode_tokens_per_s / theirs.decode_tokens_per_s
            yield Text(f"{ratio:6.2f}x  generate {ours!s}, decode, against {theirs.provider}")
    yield from _remarks(outcome)


def without_time(rows: Sequence[Row] | Sequence[GenerationRow], start: str = "") -> Iterator[Text]:
    """A line for each provider and reason it has no time, with how many points that were; what failed is red."""
    counts: dict[tuple[str, bool], int] = {}
    for row in rows:
        if (row.median_us if isinstance(row, Row) else row.decode_tokens_per_s) is None:
            key = f"{start}{row.provider}: {row.status}", row.failed
            counts[key] = counts.get(key, 0) + 1
    for (line, failed), count in counts.items():
        yield Text(f"{line} ({count} points)" if count > 1 else line, "bold red" if failed else "")


def _remarks(outcome: Outcome) -> Iterator[Text]:
    """What carries no time, what was left out, and whether the machine had other things to do."""
    yield from without_time([row for rows in outcome.rows.values() for row in rows])
    yield from without_time(outcome.generated, start="generate, ")
    yield from map(Text, outcome.left_out)
    if outcome.roofs is not None and outcome.roofs.warning is not None:
        yield Text(outcome.roofs.warning, "bold red")


def _generated(rows: Sequence[GenerationRow]) -> Table:
    """End to end: speeds of both, their ratio, and the memory of each."""
    table = simple_table("generate: prefix_attn (p), PEFT run group by group (q), and how many times better p is")
    headings = ("", "decode tok/s: p", "q", "", "first token, s: p", "q", "", "prefix MiB: p", "q", "peak MiB: p", "q")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for ours, theirs in _pairs(rows):
        speed = ours.decode_tokens_per_s, theirs.decode_tokens_per_s
        first = ours.first_token_s, theirs.first_token_s
        table.add_row(
            str(ours), *("-" if x is None else f"{x:.0f}" for x in speed), _over(*speed),
            *("-" if x is None else f"{x:.2f}" for x in first), _over(*reversed(first)),
            *(_mib(row.prefix_bytes) for row in (ours, theirs)), *(_mib(row.peak_bytes) for row in (ours, theirs)),
        )  # fmt: skip
    return table


def _pairs(rows: Sequence[GenerationRow]) -> list[tuple[GenerationRow, GenerationRow]]:
    """Ours and the other's row of each point."""
    found: dict[object, dict[bool, GenerationRow]] = {}
    for row in rows:
        found.setdefault(row.point, {})[row.provider == OURS] = row
    return [(pair[True], pair[False]) for pair in found.values() if len(pair) == 2]


def _over(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{a / b:.2f}"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def _suite(suite: str, rows: Sequence[Row]) -> Iterator[RenderableType]:
    """Our times and the ratios to the others, whose names follow in a table of means."""
    points = times_by_point(rows)
    found = {c.other: c for c in comparisons(points)}
    if not found:
        return
    names = [name for name in _others(rows) if name in found]
    peers = [name for name in names if not name.startswith(OURS)]
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if row.provider == OURS:
            kinds.setdefault(f"{row.q_heads}/{row.kv_heads}/{row.head_dim} {row.dtype}", []).append(row)
    for kind, ours in kinds.items():
        table = simple_table(f"{suite}, {kind}: time of the others over ours; above 1, ours is faster")
        for heading in ("B", "T", "m", "n", "", "ours, us", "spread", "floor", *map(str, range(1, len(peers) + 1))):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in ours:
            table.add_row(*_cells(row, points.get(str(row.point), {}), peers))
        yield table
    yield from _means(suite, [OURS, "best peer", *names], peers, found, host_times(rows))


def _means(
    suite: str, names: Sequence[str], peers: Sequence[str], found: Mapping[str, Comparison], host: Mapping[str, float]
) -> Iterator[RenderableType]:
    """A line for each provider; ours has one where the host's time is to be shown."""
    means = simple_table(f"{suite}: geometric mean and worst case of the ratios")
    for heading in ("", "against", "points", "mean", "worst", "worst at", *[HOST] * bool(host)):
        means.add_column(heading, justify="left" if heading in ("against", "worst at") else "right")
    for name in names:
        c = found.get(name)
        number = str(1 + peers.index(name)) if name in peers else ""
        us = [f"{host[name]:.0f}" if name in host else "-"] * bool(host)
        if c is not None:
            ratios = f"{c.geometric_mean:.2f}", _ratio(c.worst, name)
            means.add_row(number, name, str(c.points), *ratios, c.worst_at, *us)
        elif name in host:
            means.add_row(number, name, "", "", "", "", *us)
    yield means
    if host:
        yield Text(HOST_TIME)


def _cells(row: Row, times: Mapping[str, float], peers: Sequence[str]) -> list[str | Text]:
    """One point: sizes, our time, half of p20 to p80 over it, the floor's share of it, a ratio for each peer."""
    point = row.point
    how = " ".join([point.skew] * (point.skew != "even") + ["ragged"] * point.ragged)
    cells: list[str | Text] = [*map(str, (point.batch, point.tasks, point.m, point.n)), how]
    if row.median_us is None or row.p20_us is None or row.p80_us is None or row.fraction_of_floor is None:
        return [*cells, Text("no time", "bold red")]
    spread = (row.p80_us - row.p20_us) / 2 / row.median_us
    cells += [f"{row.median_us:.0f}", f"{spread:.0%}", f"{row.fraction_of_floor:.0%}"]
    return cells + [_ratio(times[name] / row.median_us, name) if name in times else "-" for name in peers]


def simple_table(title: str) -> Table:
    """A table without columns, in the style of all."""
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _ratio(ratio: float, name: str) -> Text:
    """Red where a peer is faster than ours; our own variants are no peers."""
    return Text(f"{ratio:.2f}", "bold red" if ratio < 1 and not name.startswith(OURS) else "")


def _others(rows: Sequence[Row]) -> list[str]:
    """Every provider but the first of ours, peers before our own variants."""
    names = [name for name in dict.fromkeys(row.provider for row in rows) if name != OURS]
    return sorted(names, key=lambda name: name.startswith(OURS))
