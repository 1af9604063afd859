"""The README tells the truth: its example runs and prints what it says, its numbers stand in the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_print_what_they_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    exec(compile(code, "README.md", "exec"), {})
    promised = re.findall(r"^print\(.*#\s*(.*)$", code, flags=re.MULTILINE)
    assert len(promised) == 3
    assert capsys.readouterr().out.split("\n")[: len(promised)] == promised


def test_the_times_of_training_stand_in_the_results() -> None:
    file = re.findall(r"`(benchmarks/results/[^`]*training\.jsonl)`", README)[0]
    rows = {row["provider"]: row for row in map(json.loads, (ROOT / file).read_text().splitlines())}
    for provider in ("prefix_attn, MLP", "PEFT, MLP"):
        assert f"{rows[provider]['seconds']:.0f} s" in README
    assert set(rows["prefix_attn, MLP"]["accuracy"].values()) == {100.0}


def test_the_numbers_stand_in_the_results() -> None:
    """The table of mixed-task decode: 32 rows over 8 tasks, from the file that the text names."""
    file = re.findall(r"`(benchmarks/results/amd[^`]*generate\.jsonl)`", README)[0]
    rows = [row for row in map(json.loads, (ROOT / file).read_text().splitlines()) if row["rows"] == 32]
    latest = {(row["prefix_tokens"], row["provider"].split(",")[0]): row for row in rows if row["tasks"] == 8}
    for m in sorted({m for m, _ in latest}):
        ours, peft = latest[m, "prefix_attn"], latest[m, "peft"]
        speeds = ours["decode_tokens_per_s"], peft["decode_tokens_per_s"]
        start = f"| {m} | {speeds[0]:.0f} | {speeds[1]:.0f} | {speeds[0] / speeds[1]:.1f}x | "
        row = next((line for line in README.splitlines() if line.startswith(start)), None)
        assert row is not None, f"README has no row that starts with {start!r}"
        held = [float(cell.split()[0]) for cell in row.split("|")[5:7]]
        assert held == pytest.approx([ours["prefix_bytes"] / 2**20, peft["prefix_bytes"] / 2**20], rel=0.005)
    every = [row for row in map(json.loads, (ROOT / file).read_text().splitlines()) if row["tasks"] == 1]
    one_task, peft = (row["decode_tokens_per_s"] for row in every)
    assert f"it is {one_task / peft:.2f} times PEFT's speed" in README


def test_the_numbers_of_serving_stand_in_the_results() -> None:
    file = re.findall(r"`(benchmarks/results/[^`]*serving\.jsonl)`", README)[0]
    latest = {(row["tasks"], row["provider"]): row for row in map(json.loads, (ROOT / file).read_text().splitlines())}
    for tasks in sorted({tasks for tasks, _ in latest}):
        ways = ("prefix_attn, engine", "peft, task by task", "transformers, no prefix")
        ours, peft, without = (latest[tasks, way] for way in ways)
        assert {row["status"] for row in (ours, peft, without)} == {"ok"}
        rates = " | ".join(f"{row['new_tokens'] / row['seconds']:.0f}" for row in (ours, peft, without))
        waits = " | ".join(f"{row['answer_s']:.1f}" for row in (ours, peft))
        assert f"| {ours['requests']} | {tasks} | {rates} | {waits} |" in README


def test_the_numbers_of_a_gpu_stand_in_the_results() -> None:
    """Decode with Llama-3's heads over 64 own keys; each row of the table against the file that the text names."""
    file = re.findall(r"`(benchmarks/results/nvidia[^`]*\.jsonl)`", README)[0]
    times: dict[tuple[int, ...], dict[str, float]] = {}
    for row in map(json.loads, (ROOT / file).read_text().splitlines()):
        shape = [row[name] for name in ("op", "n", "kv_heads", "head_dim", "dtype", "skew", "ragged")]
        if shape == ["decode", 64, 8, 128, "bfloat16", "even", False] and row["median_us"] is not None:
            times.setdefault((row["batch"], row["tasks"], row["m"]), {})[row["provider"]] = row["median_us"]
    table = README.partition("| rows | tasks | prefix tokens |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == 8
    for line in table:
        rows, tasks, m, ours, other, *ratios = (cell.strip(" *") for cell in line.strip("|").split("|"))
        at = times[int(rows), int(tasks), int(m)]
        best = min((us, name) for name, us in at.items() if not name.startswith("prefix_attn"))
        assert float(ours) == pytest.approx(at["prefix_attn"], abs=0.051), line
        assert other.lower() == f"{best[0]:.1f}, {best[1]}", line
        slower = [best[0], at["hugging face, concatenation"], at["peft, grouped by task"]]
        for said, us in zip(ratios, slower, strict=True):
            assert float(said.rstrip("x")) == pytest.approx(us / at["prefix_attn"], rel=0.03), line


def test_generation_on_a_gpu_stands_in_the_results() -> None:
    file = re.findall(r"`(benchmarks/results/nvidia[^`]*generate\.jsonl)`", README)[0]
    rows = [row for row in map(json.loads, (ROOT / file).read_text().splitlines()) if row["rows"] == 64]
    assert len(rows) == 3
    for row in rows:
        assert f"{row['decode_tokens_per_s']:,.0f}" in README
        assert f"{1e-9 * row['peak_bytes']:.1f}" in README


def test_memory_of_few_rows_on_a_gpu_stands_in_the_results() -> None:
    file = re.findall(r"`(benchmarks/results/nvidia[^`]*generate\.jsonl)`", README)[1]
    rows = map(json.loads, (ROOT / file).read_text().splitlines())
    ours, peft = (1e-9 * row["peak_bytes"] for row in rows if (row["rows"], row["prefix_tokens"]) == (16, 128))
    assert f"0.{100 * ours:.0f} GB, and PEFT, a task at a time, 0.{100 * peft:.0f}" in " ".join(README.split())
