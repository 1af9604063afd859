"""The launch benchmark on a CPU: every part of a call is timed, and the row says what was left out."""

from __future__ import annotations

import json
from pathlib import Path

from tests.kernels.test_compile import run_module


def test_parts_of_a_call(tmp_path: Path) -> None:
    run_module("benchmarks.launch", "--repeats", "3", "--out", str(tmp_path))
    (path,) = tmp_path.glob("*/launch.jsonl")
    row = json.loads(path.read_text())
    for part in ("total_us", "checks_us", "dispatch_us", "launcher_us", "plain_launch_us"):
        assert row[part] > 0, part
