"""Fit the constants of `prefix_attn.regime` to what inline and grouped decode took at the same points.

    python -m benchmarks.fit_regime benchmarks/results/nvidia-h200/2026-11-27-????????????.jsonl

L2_SPEED and LAUNCH_BYTES are those of a grid with which the way that regime.py chooses is slower than the faster one by
the least, in the geometric mean over all points where rows share; among equals, the middle. PLAN_LAUNCHES is the median
time of a plan in units of a launch. Nothing is written.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from prefix_attn import regime
from prefix_attn.errors import PrefixAttnError

from . import record
from .peers import Point
from .record import Row

INLINE, GROUPED = "prefix_attn, inline", "prefix_attn, grouped"

#: The grid of L2_SPEED and LAUNCH_BYTES.
SPEEDS, LAUNCHES_MB = np.arange(1.0, 4.0, 0.05), np.arange(0.5, 80.0, 0.5)


@dataclass(frozen=True)
class Pair:
    """Both ways at one point: times and a plan's in microseconds, the terms of regime.py in bytes."""

    point: Point
    inline_us: float
    grouped_us: float
    plan_us: float | None
    read: float  # by inline decode, from memory and the cache
    least: float  # what must come from memory
    partials: float

    @classmethod
    def of(cls, inline: Row, grouped: Row) -> Pair:
        assert inline.median_us is not None
        assert grouped.median_us is not None
        p = inline.point
        element = 4 if p.dtype == "float32" else 2
        token = 2 * p.kv_heads * p.head_dim * element
        partials = 8 * p.head_dim * p.q_heads * p.q_len * p.batch * (1 + math.ceil(p.m / regime.CHUNK))
        return cls(
            p, inline.median_us, grouped.median_us, grouped.plan_us, read=p.batch * (p.n + p.m) * token,
            least=(p.batch * p.n + p.tasks * p.m) * token, partials=float(partials),
        )  # fmt: skip

    def slowdown(self, constants: Constants) -> float:
        """How many times longer the way that the constants choose takes than the faster one, with a plan at hand."""
        grouped = self.read / constants.l2_speed - self.least > self.partials + constants.launch_bytes
        return (self.grouped_us if grouped else self.inline_us) / min(self.grouped_us, self.inline_us)


@dataclass(frozen=True)
class Constants:
    """Those of regime.py that depend on the GPU."""

    l2_speed: float
    launch_bytes: float
    plan_launches: float

    @classmethod
    def now(cls) -> Constants:
        return cls(regime.L2_SPEED, regime.LAUNCH_BYTES, regime.PLAN_LAUNCHES)

    @classmethod
    def fitted(cls, pairs: Sequence[Pair], bandwidth: float) -> Constants:
        """The best of the grid; bandwidth in bytes per microsecond.

        Raises:
            ValueError: the same way is faster at all points.
        """
        inline, grouped, read, least, partials = np.array(
            [[pair.inline_us, pair.grouped_us, pair.read, pair.least, pair.partials] for pair in pairs]
        ).T[:, :, None]  # each [pairs, 1]
        speeds, launches = (x.ravel() for x in np.meshgrid(SPEEDS, 1e6 * LAUNCHES_MB, indexing="ij"))
        chosen = np.where(read / speeds - least > partials + launches, grouped, inline)  # [pairs, constants]
        lost = np.log(chosen / np.minimum(inline, grouped)).mean(0)
        if not (inline < grouped).any() or not (inline > grouped).any():
            raise ValueError(f"{len(pairs)} points do not determine the constants; measure more of the decode grid")
        best = np.flatnonzero(lost <= lost.min() + 1e-9)
        speed, launch = (float(np.median(x[best])) for x in (speeds, launches))
        plans = [pair.plan_us * bandwidth / launch for pair in pairs if pair.plan_us is not None]
        return cls(speed, launch, statistics.median(plans) if plans else regime.PLAN_LAUNCHES)

    def verdict(self, pairs: Sequence[Pair]) -> str:
        """How well they choose."""
        slow = [pair.slowdown(self) for pair in pairs]
        worst = max(range(len(pairs)), key=slow.__getitem__)
        return (
            f"the faster way at {sum(s == 1 for s in slow)} of {len(pairs)} points; slower than it by "
            f"{statistics.geometric_mean(slow) - 1:.1%} in the geometric mean and {slow[worst] - 1:.1%} at worst "
            f"({pairs[worst].point})"
        )


def pairs_of(rows: Iterable[Row]) -> tuple[list[Pair], float]:
    """Points that tell the ways apart, and the run's copy bandwidth in bytes per microsecond.

    That is: rows share, and both ways were timed.
    """
    rows = list(rows)
    times = {(row.provider, row.point): row for row in rows if row.median_us is not None}
    pairs = [
        Pair.of(row, times[GROUPED, point])
        for (provider, point), row in times.items()
        if provider == INLINE and (GROUPED, point) in times and point.tasks < point.batch
        if point.skew == "even" and not point.ragged
    ]
    return pairs, 1e-6 * max((row.roof_bytes_per_s or 0.0 for row in rows), default=0.0)


def main(files: Annotated[list[Path], typer.Argument(help="results of one GPU")]) -> None:
    """Print the constants that fit these results, beside those of the package."""
    try:
        pairs, bandwidth = pairs_of(row for file in files for row in record.read(file, Row))
    except PrefixAttnError as e:
        typer.echo(str(e), err=True)
        raise typer.Exit(2) from e
    if not pairs:
        typer.echo(f"no point of {', '.join(map(str, files))} has a time of both {INLINE!r} and {GROUPED!r}", err=True)
        raise typer.Exit(1)
    now = Constants.now()
    try:
        fitted = Constants.fitted(pairs, bandwidth)
    except ValueError as e:
        typer.echo(str(e), err=True)
        raise typer.Exit(1) from e
    print(f"L2_SPEED = {fitted.l2_speed:.2f}  # {now.l2_speed:.2f}")
    print(f"LAUNCH_BYTES = {fitted.launch_bytes:.3g}  # {now.launch_bytes:.3g}")
    print(f"PLAN_LAUNCHES = {fitted.plan_launches:.0f}  # {now.plan_launches:.0f}")
    print(f"with these: {fitted.verdict(pairs)}")
    print(f"as it is: {now.verdict(pairs)}")


if __name__ == "__main__":
    typer.run(main)
