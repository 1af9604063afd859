"""Constants put into made-up times come out of the fit; and its terms are those of the package."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import fit_regime, record
from benchmarks.fit_regime import GROUPED, INLINE, Constants, Pair, pairs_of
from benchmarks.peers import Point
from benchmarks.record import Row
from prefix_attn import regime
from tests.test_regime import call

POINTS = [
    Point("decode", batch, tasks, m, n)
    for batch, tasks in ((16, 1), (16, 8), (64, 1), (64, 8), (256, 8))
    for m, n in ((64, 64), (128, 64), (1024, 64), (8192, 512))
]
BANDWIDTH = 4e6  # bytes per microsecond
TRUE = Constants(l2_speed=2.5, launch_bytes=6e6, plan_launches=30.0)


def row(provider: str, point: Point, us: float | None, plan_us: float | None = None) -> Row:
    sizes = {
        name: getattr(point, name) for name in ("op", "batch", "tasks", "m", "n", "q_heads", "kv_heads", "head_dim")
    }
    return Row(provider=provider, version="", dtype=point.dtype, status="", failed=False, bytes=10**9, flops=0,
               floor_us=250.0, roof_bytes_per_s=1e6 * BANDWIDTH, median_us=us, plan_us=plan_us, **sizes)  # fmt: skip


def made_up(constants: Constants, noise: float = 0.0) -> list[Row]:
    """Rows of a GPU for which regime.py is exactly right."""
    rng, rows = random.Random(0), []
    for point in POINTS:
        blank = Pair.of(row(INLINE, point, 1.0), row(GROUPED, point, 1.0))
        grouped = 20.0 + point.batch * point.n / 1000
        gain = (blank.read / constants.l2_speed - blank.least - blank.partials - constants.launch_bytes) / BANDWIDTH
        both = [max(0.5, us) * rng.uniform(1 - noise, 1 + noise) for us in (grouped + gain, grouped)]
        plan = constants.plan_launches * constants.launch_bytes / BANDWIDTH
        rows += [row(INLINE, point, both[0]), row(GROUPED, point, both[1], plan), row("other", point, 1.0)]
    return rows


def test_the_fit_finds_what_was_put_in() -> None:
    pairs, bandwidth = pairs_of(made_up(TRUE))
    assert len(pairs) == len(POINTS)
    assert bandwidth == pytest.approx(BANDWIDTH)
    fitted = Constants.fitted(pairs, bandwidth)
    assert fitted.verdict(pairs).startswith("the faster way at 20 of 20")
    assert fitted.plan_launches == pytest.approx(TRUE.plan_launches * TRUE.launch_bytes / fitted.launch_bytes)
    noisy = Constants.fitted(pairs_of(made_up(TRUE, noise=0.03))[0], bandwidth)
    assert noisy.verdict(pairs).startswith(("the faster way at 19 of 20", "the faster way at 20 of 20"))
    # the fit also tells GPUs apart: where launches are dear, a short prefix is not grouped
    dear = replace(TRUE, launch_bytes=6e7)
    assert Constants.fitted(pairs_of(made_up(dear))[0], bandwidth).launch_bytes > fitted.launch_bytes


def test_points_that_say_nothing() -> None:
    alone = Point("decode", 8, 8, 32, 64)
    rows = [
        row(INLINE, alone, 2.0),
        row(GROUPED, alone, 1.0),
        row(INLINE, POINTS[0], 2.0),
        row(GROUPED, POINTS[0], None),
    ]
    assert pairs_of(rows)[0] == []
    pairs, bandwidth = pairs_of(made_up(TRUE)[:3])
    with pytest.raises(ValueError, match="1 points do not determine"):
        Constants.fitted(pairs, bandwidth)


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_the_terms_are_those_of_the_package(point: Point) -> None:
    """With regime.py's own constants, the pair chooses as regime.py does."""
    chosen = regime.choose(call(point.batch, point.tasks, point.m, own=point.n))
    pair = Pair.of(row(INLINE, point, 1.0), row(GROUPED, point, 2.0))
    assert (pair.slowdown(Constants.now()) == 2.0) == (chosen.name == "grouped")


def test_the_command(tmp_path: Path) -> None:
    app = fit_regime.typer.Typer()
    app.command()(fit_regime.main)

    def command(rows: list[Row]) -> Any:
        file = tmp_path / f"{len(rows)}.jsonl"
        record.append(file, [replace(x, environment=None) for x in rows])
        return CliRunner().invoke(app, [str(file)])

    done = command(made_up(TRUE))
    assert done.exit_code == 0, done.output
    assert "L2_SPEED = 2." in done.output
    assert "PLAN_LAUNCHES = " in done.output
    assert "has a time of both" in command([]).output
    assert "do not determine" in command(made_up(TRUE)[:3]).output
