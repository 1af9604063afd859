"""Two results files, old and new: how many times faster each point became.

Times of two runs are compared here, so the machine's mood is in them. The peers, whose code is the same in both runs,
are the control: as much as they changed, the machine did.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from prefix_attn.errors import PrefixAttnError

from .peers import OURS
from .record import Environment, Row, read_either
from .summary import Comparison
from .tables import simple_table

#: Provider and point -> seconds, or any number that is better when it is smaller.
Times = dict[tuple[str, Hashable], float]


@dataclass(frozen=True)
class Results:
    """What one file says; ``labels`` are its points in words."""

    times: Times
    labels: dict[Hashable, str]
    environment: Environment | None

    @classmethod
    def read(cls, path: Path) -> Results:
        """Rows of attention or of generation, whichever the file holds.

        Raises:
            PrefixAttnError: the file is missing, or holds neither.
        """
        rows = read_either(path)
        times: Times = {}
        labels: dict[Hashable, str] = {}
        for row in rows:
            if isinstance(row, Row):
                seconds = row.median_us
                labels[row.point] = str(row.point)
            else:
                seconds = 1 / row.decode_tokens_per_s if row.decode_tokens_per_s else None
                labels[row.point] = row.in_full
            if seconds is not None:
                times[row.provider, row.point] = seconds
        return cls(times, labels, rows[0].environment if rows else None)


def changes(old: Results, new: Results) -> Iterator[RenderableType]:
    """A line for each point of ours, then geometric mean and worst case of every provider.

    Raises:
        PrefixAttnError: no provider has a time at the same point in both.
    """
    ratios: dict[str, list[tuple[float, str]]] = {}
    for (provider, point), seconds in old.times.items():
        if (after := new.times.get((provider, point))) is not None:
            ratios.setdefault(provider, []).append((seconds / after, new.labels[point]))
    if not ratios:
        raise PrefixAttnError("bench compare: no provider has a time at the same point in both files")
    points = simple_table("old time over new; above 1, the new is faster")
    points.add_column("point")
    points.add_column(OURS, justify="right")
    for ratio, label in ratios.get(OURS, []):
        points.add_row(label, Text(f"{ratio:.2f}", "bold red" if ratio < 1 else ""))
    yield points
    means = simple_table(
        "geometric mean and worst case; the peers' code did not change, so their ratios are the machine's"
    )
    for heading in ("provider", "points", "mean", "worst", "worst at"):
        means.add_column(heading, justify="left" if heading in ("provider", "worst at") else "right")
    for provider in sorted(ratios, key=lambda name: name != OURS):
        c = Comparison.of(provider, ratios[provider])
        means.add_row(provider, str(c.points), f"{c.geometric_mean:.2f}", f"{c.worst:.2f}", c.worst_at)
    yield means
    yield from map(Text, _differences(old.environment, new.environment))


def _differences(old: Environment | None, new: Environment | None) -> Iterator[str]:
    """What else changed between the runs."""
    if old is None or new is None:
        yield "one of the files does not say where it was made"
        return
    for name in ("device", "driver", "threads", "torch_version", "triton_version", "transformers_version", "commit"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            yield f"{name}: {before} -> {after}"
