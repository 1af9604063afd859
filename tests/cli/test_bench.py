"""``prefix-attn bench`` on grids that take no time: what it prints, what it stores, what it refuses to time."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefix_attn.backends import cpu
from prefix_attn.benchmarks import run as benchmarks
from prefix_attn.benchmarks.peers import Point
from prefix_attn.benchmarks.roofs import Roofs
from tests.cli.conftest import Run

SIZES: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
POINTS = {
    "decode": [Point("decode", 5, 2, 32, 7, **SIZES), Point("decode", 2, 1, 16, 3, **SIZES)],
    "prefill": [Point("prefill", 3, 2, 16, 6, **SIZES)],
    "mixed": [Point("decode", 9, 3, 32, 7, **SIZES, skew="zipf")],
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny grids, no measurement of roofs, threads as the tests set them."""
    roofs = Roofs(1e9, 1e10, {"float32": 1e9}, launch_us=1.0)
    monkeypatch.setattr(benchmarks, "attention_points", lambda suite, on_gpu, quick: POINTS[suite])
    monkeypatch.setattr(benchmarks, "measure_roofs", lambda device, dtypes: roofs)
    monkeypatch.setattr(benchmarks, "pin_threads", lambda: None)
    monkeypatch.setattr("prefix_attn.benchmarks.timing.MIN_SECONDS", 1e-4)
    monkeypatch.setattr("prefix_attn.benchmarks.timing.MAX_SETS", 2)


def stored(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.rglob("*.jsonl") for line in file.read_text().splitlines()]


@pytest.mark.parametrize("suite", POINTS)
def test_a_suite_is_measured_stored_and_shown(suite: str, run: Run, tmp_path: Path) -> None:
    result = run("bench", suite, "--device", "cpu", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"{suite}, 4/2/16 float32: time of the others over ours" in result.stdout
    assert "sdpa, replica updated in place" in result.stdout
    rows = stored(tmp_path)
    assert {row["status"] for row in rows} == {"ok"}
    assert len(rows) == len(POINTS[suite]) * len(benchmarks.cpu_peers())
    for row in rows:
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["fraction_of_floor"] > 0
        assert row["peak_bytes"] > 0
        assert row["commit"]
        assert row["threads"] > 0
    page = next(tmp_path.rglob("*.md")).read_text()
    assert "geometric mean" in page


def test_a_second_run_adds_to_the_file(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("bench", "prefill", "--device", "cpu", "--output", tmp_path).exit_code == 0
    assert len(stored(tmp_path)) == 2 * len(benchmarks.cpu_peers())


@pytest.mark.filterwarnings("default:.*skipped what is no JSON object")
def test_a_run_goes_on_below_a_torn_line(run: Run, tmp_path: Path) -> None:
    assert run("bench", "prefill", "--device", "cpu", "--output", tmp_path).exit_code == 0
    (file,) = tmp_path.rglob("*.jsonl")
    with file.open("a") as lines:
        lines.write('{"provider": "prefix_attn", "ver')
    again = run("bench", "prefill", "--device", "cpu", "--output", tmp_path)
    assert again.exit_code == 0, again.output
    assert f"warning: {file}: skipped what is no JSON object: line " in again.stderr
    compared = run("bench", "compare", file, file)
    assert "1.00" in compared.stdout
    assert compared.stderr.count("warning: ") == 1


def test_a_quick_run_has_a_file_of_its_own(run: Run, tmp_path: Path) -> None:
    assert run("bench", "prefill", "--device", "cpu", "--output", tmp_path).exit_code == 0
    assert run("bench", "prefill", "--quick", "--device", "cpu", "--output", tmp_path).exit_code == 0
    whole, quick = sorted(tmp_path.rglob("*.jsonl"), key=lambda file: len(file.name))
    assert quick.name == f"{whole.stem}-quick.jsonl"
    assert quick.with_suffix(".md").is_file()


def test_an_interrupted_run_keeps_what_it_has(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = benchmarks.Bench.rows

    def interrupted(self: Any, point: Point, seconds: float, seed: int) -> Any:
        if seed:
            raise KeyboardInterrupt
        return measure(self, point, seconds, seed)

    monkeypatch.setattr(benchmarks.Bench, "rows", interrupted)
    result = run("bench", "decode", "--device", "cpu", "--output", tmp_path)
    assert result.exit_code == 130
    assert "interrupted in decode" in result.stdout
    (file,) = tmp_path.rglob("*.jsonl")
    assert f"rows: {file}" in result.stdout
    assert len(stored(tmp_path)) == len(benchmarks.cpu_peers())
    assert "interrupted in decode" in file.with_suffix(".md").read_text()


def time_for_one_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of one second is over when the first point has been measured."""
    clock = itertools.chain([0.0] * 4, itertools.repeat(2.0))  # budget, share, deadline, first point; then the second
    monkeypatch.setattr(benchmarks, "time", SimpleNamespace(monotonic=lambda: next(clock)))


def test_the_summary_keeps_the_notes_of_all_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as hurry:
        time_for_one_point(hurry)
        assert run("bench", "decode", "--budget", "1", "--device", "cpu", "--output", tmp_path).exit_code == 0
    assert run("bench", "prefill", "--device", "cpu", "--output", tmp_path).exit_code == 0
    page = next(tmp_path.rglob("*.md")).read_text()
    assert "decode left out for want of time: decode B=2 T=1 m=16 n=3" in page
    assert "## prefill" in page


def test_against_a_peer_only_ratios_are_printed(run: Run, tmp_path: Path) -> None:
    result = run("bench", "decode", "--against", "in place", "--device", "cpu", "--output", tmp_path)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert all(float(line.partition("x")[0]) > 0 for line in lines)
    assert lines[0].endswith("decode B=5 T=2 m=32 n=7 4/2/16/float32  against sdpa, replica updated in place")
    assert "geometric mean of 2 points" in lines[2]
    assert stored(tmp_path) == []  # a file keeps runs of all peers only
    unknown = run("bench", "decode", "--against", "nobody", "--device", "cpu", "--output", tmp_path)
    assert unknown.exit_code == 2
    assert "peft, grouped by task" in unknown.output


def test_what_cannot_run_ends_with_2(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device, says in (
        ("tpu", "cannot use 'tpu'"),
        ("cuda:x", "cannot use 'cuda:x'"),
        ("meta", "expected auto, cpu,"),
    ):
        result = run("bench", "decode", "--device", device, "--output", tmp_path)
        assert result.exit_code == 2
        assert f"--device: {says}" in result.output
    only_peft = run("bench", "generate", "--against", "in place", "--device", "cpu")
    assert only_peft.exit_code == 2
    assert "PEFT is the only peer that generate has" in only_peft.output
    monkeypatch.setattr(benchmarks, "peft_cannot_generate", lambda: "PEFT is not installed")
    without_peft = run("bench", "generate", "--device", "cpu", "--output", tmp_path)
    assert without_peft.exit_code == 2
    assert "PEFT is not installed" in without_peft.output
    assert stored(tmp_path) == []


def test_a_budget_stops_and_says_what_it_left_out(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_for_one_point(monkeypatch)
    result = run("bench", "decode", "--budget", "1", "--device", "cpu", "--output", tmp_path)
    assert result.exit_code == 0
    assert "decode left out for want of time: decode B=2 T=1 m=16 n=3" in result.stdout


def test_time_is_shared_by_what_suites_usually_take() -> None:
    clock = benchmarks.Clock(["decode", "prefill"], quick=False, budget=41)
    assert clock.share("decode") == pytest.approx(41 * 330 / 410, abs=0.5)
    assert clock.share("prefill") == pytest.approx(41, abs=0.5)


def test_a_broken_kernel_is_not_timed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.forward

    def broken(call: Any) -> Any:
        out, lse = right(call)
        return out * 1.001, lse

    monkeypatch.setattr(cpu, "forward", broken)
    result = run("bench", "decode", "--device", "cpu", "--output", tmp_path)
    assert result.exit_code == 1
    assert "prefix_attn: wrong: error" in result.stdout
    for row in stored(tmp_path):
        ours = row["provider"].startswith("prefix_attn")
        assert row["failed"] == ours
        assert (row["median_us"] is None) == ours
