"""The launch benchmark on a CPU: every part of a call is timed, and the row says what was left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.record import ROOT


def test_parts_of_a_call(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.launch", "--repeats", "3", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = tmp_path.glob("*/launch.jsonl")
    row = json.loads(path.read_text())
    for part in ("total_us", "checks_us", "dispatch_us", "launcher_us"):
        assert row[part] > 0, part
    assert (row["plain_launch_us"] is None) == ("no GPU" in row["status"])
