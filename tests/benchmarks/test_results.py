"""What is made of results files: figures that show every loss, and the changes from one file to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.patches import Rectangle
from rich.console import Console

from benchmarks import plot, record, summary, tables
from benchmarks.changes import Results, changes
from benchmarks.peers import NO_PREFIX, OURS, Point
from benchmarks.record import Environment, GenerationRow, Row, append, generation_path, read
from benchmarks.run import Outcome
from prefix_attn.errors import PrefixAttnError

ENVIRONMENT = replace(Environment.read(torch.device("cpu"), "abc"), device="Test CPU", date="2026-01-02", run="first")


def row(provider: str, point: Point, us: float | None, environment: Environment = ENVIRONMENT) -> Row:
    return Row(
        provider=provider, version="1", **vars(point), status="ok" if us else "refused", failed=False, bytes=10**6,
        flops=10**6, floor_us=1.0, median_us=us, roof_bytes_per_s=1e10, roof_cache_bytes_per_s=1e11,
        roof_flops_per_s=1e11, environment=environment,
    )  # fmt: skip


def generation(provider: str, rows: int, tasks: int, speed: float) -> GenerationRow:
    return GenerationRow(
        provider=provider, version="1", model="GPT-2", dtype="float32", rows=rows, tasks=tasks, prefix_tokens=100,
        prompt_tokens=16, new_tokens=9, cache="dynamic", status="ok", failed=False, decode_tokens_per_s=speed,
        prefix_bytes=tasks * 10**6, peak_bytes=rows * 10**6, environment=ENVIRONMENT,
    )  # fmt: skip


#: Ours takes 100 us; the fastest other as given: at 50 it is faster.
FASTEST = {(1, 20): 50.0, (1, 128): 200.0, (4, 20): 99.0, (4, 128): 500.0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "results" / "test-cpu" / "2026-01-02-abc.jsonl"
    for (batch, m), us in FASTEST.items():
        point = Point("decode", batch, 1, m, 64)
        append(path, [row(OURS, point, 100.0), row(NO_PREFIX, point, 1.0), row("slow", point, 1000.0)])
        append(path, [row("fast", point, us), row("absent", point, None)])
    append(path, [row(OURS, Point("decode", 4, tasks, 128, 64), 100.0) for tasks in (2, 4)])
    append(path, [row("fast", Point("decode", 4, tasks, 128, 64), 300.0) for tasks in (2, 4)])
    pairs = [(who, rows, tasks) for rows, tasks in ((4, 4), (8, 4), (8, 2)) for who in (OURS, "peft, grouped by task")]
    append(generation_path(path), [generation(*pair, speed=100.0) for pair in pairs])
    return path


def test_all_figures_are_drawn_from_the_newest_files(file: Path, tmp_path: Path) -> None:
    append(file.with_name("2025-12-31-old.jsonl"), [row(OURS, Point("decode", 1, 1, 1, 1), 1.0)])
    files = plot.latest(tmp_path / "results")
    assert files == [file, generation_path(file)]
    written = plot.draw(files, tmp_path / "figures")
    assert {path.name for path in written} == {f"test-cpu-{name}.png" for name in plot.FIGURES}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_ratios_are_to_the_fastest_other_and_losses_are_framed(file: Path) -> None:
    (device,) = plot.devices([file])
    assert {(p.batch, p.m): r for p, r in device.ratios.items() if p.tasks == 1} == {
        place: us / 100 for place, us in FASTEST.items()
    }
    figure = plot.heat_map(device)
    assert figure is not None
    frames = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert len(frames) == sum(us < 100 for us in FASTEST.values())
    cells = {text.get_text() for text in figure.axes[0].texts}
    assert {"0.50", "0.99", "2.00", "5.00", "3.00"} <= cells


def test_the_roof_of_several_runs_is_the_highest(file: Path) -> None:
    low = {"roof_bytes_per_s": 1e7, "roof_cache_bytes_per_s": 1e6, "roof_flops_per_s": 1e10}
    append(file, [replace(row(OURS, Point("decode", 2, 1, 20, 64), 100.0), **low)])  # type: ignore[arg-type]
    (device,) = plot.devices([file])
    figure = plot.roofline(device)
    assert figure is not None
    memory, cache = figure.axes[0].lines
    assert memory.get_ydata()[0] == pytest.approx(1e10 * memory.get_xdata()[0] / 1e9)  # type: ignore[index]
    assert cache.get_ydata()[-1] == pytest.approx(100.0)  # type: ignore[index]


def test_without_data_nothing_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(PrefixAttnError, match="expected DEVICE/DATE-COMMIT"):
        plot.latest(tmp_path)
    empty = tmp_path / "2026-01-01-abc.jsonl"
    append(empty, [row(OURS, Point("decode", 1, 1, 20, 64), None)])
    with pytest.raises(PrefixAttnError, match="hold no time"):
        plot.draw([empty], tmp_path)
    with pytest.raises(PrefixAttnError, match="no such file"):
        plot.draw([tmp_path / "none.jsonl"], tmp_path)


def test_a_later_run_of_a_point_replaces_all_of_the_earlier_one(file: Path) -> None:
    point = Point("decode", 1, 1, 20, 64)
    append(file, [row(OURS, point, 70.0, replace(ENVIRONMENT, run="second"))])
    assert [(r.provider, r.median_us) for r in read(file, Row) if r.point == point] == [(OURS, 70.0)]


def test_host_time_is_shown_where_it_was_measured() -> None:
    rows: list[Row] = []
    for batch, host in ((1, 40.0), (2, 56.4), (4, 90.0)):
        point = Point("decode", batch, 1, 20, 64)
        rows += [replace(row(OURS, point, 10.0), host_us=host), replace(row("fast", point, 20.0), host_us=7.0)]
        rows += [row("graph", point, 30.0)]
    page = summary.markdown(rows, ENVIRONMENT)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    assert ["other", "points", "geometric mean", "worst", "worst at", "host, us a call"] in cells
    assert ["prefix_attn", "3", "-", "-", "-", "56"] in cells
    assert [line[-1] for line in cells if line[0] in ("fast", "graph")] == ["7", "-"]
    assert "outside a graph a call takes at least the host's time." in page
    console = Console(width=120)
    with console.capture() as capture:
        for part in tables.everything(Outcome(None, {"decode": rows})):
            console.print(part)
    shown = [line.split() for line in capture.get().splitlines()]
    assert ["prefix_attn", "56"] in shown
    assert ["1", "fast", "3", "2.00", "2.00"] in [line[:5] for line in shown if line[-1:] == ["7"]]
    on_a_cpu = [row(OURS, point, 10.0), row("fast", point, 20.0)]
    assert "host" not in summary.markdown(on_a_cpu, ENVIRONMENT)


def test_points_that_an_l2_cache_may_hold_are_named() -> None:
    small, large = (Point("decode", batch, 1, 20, 64) for batch in (1, 2))
    rows = [
        replace(row(OURS, small, 10.0), host_us=1.0, sets=64),
        replace(row(OURS, large, 10.0), host_us=1.0, sets=64),
    ]
    rows[1] = replace(rows[1], bytes=10**7)
    (line,) = [line for line in summary.markdown(rows, ENVIRONMENT).splitlines() if "Not past the L2 cache" in line]
    assert line.endswith(f": {small} (64 MB).")
    assert "L2" not in summary.markdown([replace(each, host_us=None) for each in rows], ENVIRONMENT)


def test_ratios_are_printed_where_both_have_a_time() -> None:
    ours, theirs = (generation(who, 8, 4, speed=100.0) for who in (OURS, "peft, grouped by task"))
    other = [replace(each, rows=4, decode_tokens_per_s=None, status="no time: busy") for each in (ours, theirs)]
    lines = [str(line) for line in tables.ratios(Outcome(None, generated=[ours, theirs, *other]))]
    assert lines == [
        "  1.00x  generate GPT-2 B=8 T=4 m=100, decode, against peft, grouped by task",
        "generate, prefix_attn: no time: busy",
        "generate, peft, grouped by task: no time: busy",
    ]


def test_quick_runs_are_drawn_only_when_they_are_named(file: Path, tmp_path: Path) -> None:
    quick = replace(ENVIRONMENT, date="2026-01-03").path(tmp_path / "results", quick=True)
    assert quick.name == "2026-01-03-abc-quick.jsonl"
    append(quick, [row(OURS, Point("decode", 1, 1, 20, 64), 100.0)])
    append(generation_path(quick), [generation(OURS, 8, 4, speed=100.0)])
    assert plot.latest(tmp_path / "results") == [file, generation_path(file)]
    file.unlink()
    generation_path(file).unlink()
    with pytest.raises(PrefixAttnError, match="those of --quick runs are drawn only then"):
        plot.latest(tmp_path / "results")


def test_a_torn_line_costs_its_own_row_alone(file: Path, tmp_path: Path) -> None:
    whole = file.read_text()
    lines = whole.count("\n")
    file.write_text(whole + '{"provider": "prefix_attn", "batch": 4, "ta')
    with pytest.warns(UserWarning, match=f"2026-01-02-abc.jsonl: .* line {lines + 1}$"):
        assert plot.latest(tmp_path / "results") == [file, generation_path(file)]
    point = Point("decode", 1, 1, 20, 64)
    append(file, [row(OURS, point, 70.0, replace(ENVIRONMENT, run="second"))])
    assert file.read_text().startswith(whole)
    with pytest.warns(UserWarning, match="skipped"):
        assert [r.median_us for r in read(file, Row) if r.point == point] == [70.0]


def test_a_newest_file_without_rows_is_passed_over(file: Path, tmp_path: Path) -> None:
    file.with_name("2026-01-03-empty.jsonl").touch()
    file.with_name("2026-01-03-torn.jsonl").write_text('{"provider": "pre')
    with pytest.warns(UserWarning, match="passed over: .*torn.jsonl, line 1: expected JSON lines"):
        assert plot.latest(tmp_path / "results") == [file, generation_path(file)]


def test_a_wrong_file_is_named_with_its_line(file: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("\nnothing of ours\n")
    results = Path(record.__file__).parent / "results" / "amd-epyc"
    for wrong, line in ((text, 2), (results / "launch.jsonl", 1), (results / "serving.jsonl", 1)):
        with pytest.raises(PrefixAttnError, match=rf"{wrong.name}, line {line}: expected JSON lines written by"):
            plot.draw([file, wrong], tmp_path)
    renamed = generation_path(file).rename(tmp_path / "mine.jsonl")
    (device,) = plot.devices([renamed])
    assert len(device.generated) == 6


def text_of(old: Path, new: Path) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        for part in changes(Results.read(old), Results.read(new)):
            console.print(part)
    return capture.get()


def test_changes(file: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.jsonl"
    later = replace(ENVIRONMENT, commit="def", threads=99)
    for (batch, m), us in FASTEST.items():
        point = Point("decode", batch, 1, m, 64)
        append(new, [row(OURS, point, 50.0 if m == 20 else 200.0, later), row("fast", point, us, later)])
    shown = text_of(file, new)
    lines = [line.split() for line in shown.splitlines()]
    assert ["decode", "B=1", "T=1", "m=20", "n=64", "2.00"] in [line[-6:] for line in lines]
    assert ["decode", "B=4", "T=1", "m=128", "n=64", "0.50"] in [line[-6:] for line in lines]
    assert ["prefix_attn", "4", "1.00", "0.50"] in [line[:4] for line in lines]
    assert ["fast", "4", "1.00", "1.00"] in [line[:4] for line in lines]
    assert "commit: abc -> def" in shown
    assert f"threads: {ENVIRONMENT.threads} -> 99" in shown
    assert "GPT-2 B=4 T=4 m=100" in text_of(generation_path(file), generation_path(file))


def test_changes_are_of_the_same_prompt_and_dtype(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    usual = generation(OURS, 8, 4, speed=100.0)
    others = [replace(usual, prompt_tokens=8, new_tokens=4), replace(usual, dtype="bfloat16")]
    append(old, [usual, *(replace(other, decode_tokens_per_s=1.0) for other in others)])
    append(new, [replace(usual, decode_tokens_per_s=150.0)])
    assert "GPT-2 B=8 T=4 m=100, float32, 16 + 9 tokens 1.50" in " ".join(text_of(old, new).split())
    append(tmp_path / "other.jsonl", others)
    with pytest.raises(PrefixAttnError, match="no provider has a time at the same point"):
        text_of(tmp_path / "other.jsonl", new)


def test_changes_refuses_what_it_cannot_compare(file: Path, tmp_path: Path) -> None:
    other, nonsense = tmp_path / "other.jsonl", tmp_path / "nonsense.jsonl"
    append(other, [row(OURS, Point("decode", 99, 1, 20, 64), 1.0)])
    nonsense.write_text('{"a": 1}\n')
    for old, new, message in (
        (file, tmp_path / "none", "no such file"), (file, nonsense, "written by `prefix-attn bench`"),
        (file, other, "no provider has a time at the same point"), (file, generation_path(file), "same point"),
    ):  # fmt: skip
        with pytest.raises(PrefixAttnError, match=message):
            text_of(old, new)
