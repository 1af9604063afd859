"""The command's own logic: statistics, budget, stages, exit codes. No GPU is needed, and none is used."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu, record, summary, warm
from benchmarks.compare import Bench, DeviceLost
from benchmarks.gpu import STAGES, Budget, chosen, run_tests
from benchmarks.peers import AGAIN, NO_PREFIX, OURS, Ours, Point, SdpaConcatenated
from benchmarks.record import Environment
from benchmarks.run import run_points
from benchmarks.suites import attention_points
from benchmarks.summary import comparisons
from benchmarks.timing import (
    GraphRunner,
    LoopRunner,
    Timing,
    cpu_cache_bytes,
    host_us,
    input_sets,
    measure,
    runner_for,
)

CPU = torch.device("cpu")
ENVIRONMENT = Environment.read(CPU, "abc")


class Clockwork:
    """A runner whose replays take a fixed time."""

    def __init__(self, seconds: float, calls: int = 2) -> None:
        self.once, self.calls = seconds, calls
        self.outs: list[torch.Tensor] = []
        self.replays: list[int] = []

    def seconds(self, replays: int) -> float:
        self.replays.append(replays)
        return self.once * replays


def test_timing() -> None:
    timing = Timing.of([1e-6, 9e-6, 2e-6, 3e-6, 4e-6], calls=10)
    assert timing.median_us == pytest.approx(3)
    assert timing.p20_us == pytest.approx(1.8)
    assert timing.p80_us == pytest.approx(5)
    assert Timing.of([2e-6], calls=1) == Timing(2.0, 2.0, 2.0, 1, 1)


def test_input_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert input_sets(1, gpu) == 64
    assert input_sets(100_000_000, gpu) == 3
    assert input_sets(10**10, gpu) == 2
    assert cpu_cache_bytes() > 2**15
    monkeypatch.setattr("benchmarks.timing.cpu_cache_bytes", lambda: 50_000_000)
    assert [input_sets(size, torch.device("cpu")) for size in (10**7, 10**8)] == [10, 1]


def test_measure_replays_enough_and_not_too_much() -> None:
    rich = {"fast": Clockwork(1e-4), "slow": Clockwork(0.04)}
    timings = measure(rich, seconds=60, rng=random.Random(0))
    assert timings["fast"].median_us == pytest.approx(50)  # two calls a replay
    assert timings["fast"].calls == 2 * 500  # 50 ms
    assert rich["slow"].replays == [1, 1] + [5] * 7
    poor = {"fast": Clockwork(1e-4), "slow": Clockwork(0.04)}
    measure(poor, seconds=0.14, rng=random.Random(0))
    assert poor["fast"].replays[2:] == [100] * 7
    assert poor["slow"].replays[2:] == [1] * 7


def test_measure_ends_in_time() -> None:
    slow = {"slow": Clockwork(1.0)}
    (timing,) = measure(slow, seconds=-1, rng=random.Random(0)).values()
    assert slow["slow"].replays == [1] + [1] * 3  # one second is too long to be repeated for its own sake
    assert timing.repeats == 3


def test_loop_runner_makes_every_call() -> None:
    seen: list[int] = []

    def call(i: int) -> torch.Tensor:
        seen.append(i)
        return torch.full((1,), float(i))

    runner = LoopRunner([lambda: call(0), lambda: call(1)], CPU)
    assert runner.seconds(2) > 0
    assert seen == [0, 1, 0, 1]
    assert [int(x) for x in runner.outs] == [0, 1]


def test_host_time_is_that_of_the_fastest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate(itertools.chain([0.0, 0.9, 0.1, 0.04], itertools.repeat(0.1)))
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: next(clock))
    seen: list[int] = []

    def call() -> torch.Tensor:
        seen.append(1)
        return torch.zeros(1)

    assert host_us([call] * 50, CPU) == pytest.approx(1e6 * 0.04 / 20)
    assert len(seen) == 10 * 20


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Streams, graphs and events that record what is asked of them; each pair of events is 3 ms apart."""
    cuda = MagicMock()
    cuda.Event.return_value.elapsed_time.return_value = 3.0
    for name in ("Stream", "current_stream", "stream", "synchronize", "CUDAGraph", "graph", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    return cuda


def test_graph_runner_captures_once_and_replays(pretended_cuda: MagicMock) -> None:
    seen: list[int] = []

    def call() -> torch.Tensor:
        seen.append(1)
        return torch.zeros(1)

    runner, note = runner_for([call, call, call], torch.device("cuda"))
    assert isinstance(runner, GraphRunner)
    assert note == ""
    assert len(seen) == 1 + 3  # a warm-up, the capture
    assert (runner.calls, len(runner.outs)) == (3, 3)
    assert runner.seconds(5) == pytest.approx(0.003)
    assert len(seen) == 4
    assert pretended_cuda.CUDAGraph.return_value.replay.call_count == 5
    assert runner.call_list == [call, call, call]  # what they hold must live as long as the graph
    capture_stream = pretended_cuda.graph.call_args.kwargs["stream"]
    assert capture_stream is pretended_cuda.Stream.return_value


def test_what_cannot_be_captured_is_timed_with_events(pretended_cuda: MagicMock) -> None:
    pretended_cuda.graph.side_effect = RuntimeError("operation not permitted when stream is capturing\nmore")
    runner, note = runner_for([lambda: torch.ones(1)], torch.device("cuda"))
    assert isinstance(runner, LoopRunner)
    assert note == "timed with events, not a graph: operation not permitted when stream is capturing"
    assert runner.seconds(2) == pytest.approx(0.003)
    assert len(runner.outs) == 1
    pretended_cuda.graph.side_effect = torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError):
        runner_for([lambda: torch.ones(1)], torch.device("cuda"))


def test_points_are_those_of_the_protocol() -> None:
    decode, prefill = (attention_points(suite, on_gpu=True, quick=False) for suite in ("decode", "prefill"))
    llama = [p for p in decode if str(p) == f"decode B={p.batch} T={p.tasks} m={p.m} n={p.n}"]
    assert len(llama) == 8 * 4 * 2 + 8 + 2
    assert len(decode) == len(llama) + 3 * 6 + 4 + 4
    assert len(prefill) == 12 + 4
    assert all(p.q_len == 1 for p in decode)
    assert all(p.q_len == p.n for p in prefill)
    assert str(decode[0]) == "decode B=16 T=1 m=1024 n=64"
    assert str(Point("decode", 1, 1, 2, 3, dtype="float16")) == "decode B=1 T=1 m=2 n=3 32/8/128/float16"


def test_budget_leaves_room_for_later_stages() -> None:
    budget = Budget(510, list(STAGES))
    tests, memcheck, decode, generate = (budget.share(name) for name in ("tests", "memcheck", "decode", "generate"))
    assert tests == pytest.approx(510 - 20 - 20 - 40 - 45 - 20 - 20 - 40, abs=1)
    assert memcheck == 60
    assert decode == pytest.approx(510 * 3 / 6.5, abs=1)
    assert generate == pytest.approx(510, abs=1)
    late = Budget(510, list(STAGES), started=time.monotonic() - 440)
    assert late.share("tests") is None
    assert late.share("decode") is None
    assert late.share("mixed") == pytest.approx(70 / 2.5, abs=1)
    assert Budget(510, ["decode"], started=time.monotonic() - 470).share("decode") is None


def test_stages() -> None:
    assert chosen("prefill, tests") == ["tests", "prefill"]
    for bad in ("", "decode,warmup"):
        with pytest.raises(Exception, match="expected some of tests, determinism, memcheck, parity, decode"):
            chosen(bad)


def test_failing_and_slow_tests_are_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_good(): pass\ndef test_bad(): assert False\ndef test_slow(): time.sleep(60)\n"
    )
    file = str(tmp_path / "test_it.py")
    assert run_tests([f"{file}::test_good"], seconds=60)
    assert not run_tests([f"{file}::test_bad"], seconds=60)
    assert not run_tests([f"{file}::test_slow"], seconds=2)
    assert "cut short after 2 s" in capsys.readouterr().out


def test_what_failed_is_said_before_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_bad(): assert 1 == 2\ndef test_slow(): time.sleep(60)\n"
    )
    assert not run_tests([str(tmp_path / "test_it.py"), "-p", "tests.conftest"], seconds=8)
    said = capfd.readouterr().out
    assert "test_it.py::test_bad" in said
    assert "assert 1 == 2" in said


def test_tests_run_under_a_checker_and_leave_nothing_behind(tmp_path: Path) -> None:
    checker, said = tmp_path / "checker", tmp_path / "said"
    checker.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > {said}\nsleep 60 &\necho $! >> {said}\nwait\n'
    )
    checker.chmod(0o755)
    assert not run_tests(["tests/none.py"], seconds=2, under=[str(checker), "--tool", "memcheck"])
    arguments, child = said.read_text().splitlines()
    assert arguments.startswith("1 --tool memcheck ")
    assert arguments.endswith("-m pytest -q --tb=short -W default tests/none.py")
    for _ in range(100):  # killed, it is gone as soon as the system has seen to it
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {child} still runs")


def test_every_file_of_tests_exists() -> None:
    arguments = [argument for stage in gpu.TESTS.values() for argument in stage]
    paths = [argument.split("=")[-1].split("::")[0] for argument in arguments if "tests/" in argument]
    assert len(paths) > 8
    for path in paths:
        assert (record.ROOT / path).exists(), path


def test_kernels_are_compiled_beside_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Busy:
        pid = 0

        def poll(self) -> int | None:
            return None

        def wait(self, seconds: float) -> None:
            raise gpu.subprocess.TimeoutExpired("", seconds)

    def begin(command: list[str], **_: Any) -> Busy:
        started.append(command[2:])
        return Busy()

    monkeypatch.setattr(gpu, "find_spec", lambda name: name == "flashinfer")
    monkeypatch.setattr(gpu.subprocess, "Popen", begin)
    monkeypatch.setattr(gpu, "end", lambda process: started.append("ended"))
    assert gpu.Compilations.begin(["tests", "generate"]).wait(1) == []
    compilations = gpu.Compilations.begin(["tests", "decode", "mixed", "generate"])
    assert started == [["benchmarks.warm", "--suites", "decode,mixed"], ["benchmarks.peers.flashinfer"]]
    slow, missing = compilations.wait(1)
    assert slow == "kernels were still being compiled when timing began"
    assert missing == "FlashInfer's kernels were not all compiled in time"
    assert started[2:] == ["ended", "ended"]
    assert compilations.wait(1) == []


def test_every_point_is_run_once_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class Fake(Ours):
        def prepare(self, problem: Any) -> Any:
            return lambda: ran.append(f"{self.name} {problem.point}")

    class Broken(Ours):
        def prepare(self, problem: Any) -> Any:
            raise RuntimeError

    monkeypatch.setattr(warm, "all_peers", lambda: [Fake("a"), Broken("b"), SdpaConcatenated()])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(warm.torch, "device", lambda *_: CPU)
    warm.run_once(Point("decode", 2, 1, 4, 3, 2, 1, 16))
    assert ran == ["a decode B=2 T=1 m=4 n=3 2/1/16/bfloat16"]

    app = gpu.typer.Typer()
    app.command()(warm.main)
    assert CliRunner().invoke(app, ["--suites", "generate"]).exit_code == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds none; nothing was run" in CliRunner().invoke(app).output


def test_points_are_left_out_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(torch.device("cpu"), ENVIRONMENT, roofs=None, peers=[])  # type: ignore[arg-type]
    points = [Point("decode", batch, 1, 32, 64) for batch in (1, 2, 3, 4)]
    measured: list[Point] = []

    def rows(self: Bench, point: Point, seconds: float, seed: int) -> list[Any]:
        assert 0 < seconds < 1
        measured.append(point)
        if len(measured) == 2:
            raise torch.OutOfMemoryError
        time.sleep(0.2)
        return []

    monkeypatch.setattr(Bench, "rows", rows)
    kept: list[Any] = []
    left_out = run_points(bench, points, 0.3, kept.append, "decode")
    assert measured == points[:3]
    assert kept == [[], []]
    assert left_out == [
        f"decode left out for want of memory: {points[1]}", f"decode left out for want of time: {points[3]}"
    ]  # fmt: skip


def command(*arguments: str) -> Any:
    app = gpu.typer.Typer()
    app.command()(gpu.main)
    return CliRunner().invoke(app, list(arguments))


def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = command()
    assert result.exit_code == 2
    assert "finds none; nothing was run" in result.output
    assert command("--stages", "lunch").exit_code == 2


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command believes in a GPU, and nothing that would need one is run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(gpu.record.Environment, "read", lambda device, commit: ENVIRONMENT)
    monkeypatch.setattr("benchmarks.run.measure_roofs", lambda device, dtypes: None)
    monkeypatch.setattr(gpu, "run_generate", lambda *args, **options: None)
    monkeypatch.setattr(gpu, "run_tests", lambda targets, seconds, under: True)
    monkeypatch.setattr(gpu, "sanitizer", lambda: None)
    monkeypatch.setattr(gpu.Compilations, "begin", lambda stages: gpu.Compilations())
    monkeypatch.setattr(Bench, "rows", lambda self, point, seconds, seed: [])


@pytest.mark.usefixtures("pretended_gpu")
def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = command("--out", str(tmp_path))
    assert result.exit_code == 0
    stages = (
        "tests passed",
        "determinism passed",
        "memcheck left out: compute-sanitizer is not on this machine",
        "parity passed",
        *(f"{name} measured" for name in ("decode", "prefill", "mixed", "generate")),
    )
    assert "; ".join(stages) in result.output

    result = command("--out", str(tmp_path), "--budget", "50", "--stages", "tests,prefill")
    assert result.exit_code == 0
    assert "tests left out: only 50 s remained; prefill measured" in result.output

    monkeypatch.setattr(gpu, "run_tests", lambda targets, seconds, under: targets is gpu.TESTS["parity"])
    monkeypatch.setattr(gpu, "sanitizer", lambda: ["checker"])
    result = command("--out", str(tmp_path))
    assert result.exit_code == 1
    assert "tests FAILED; determinism FAILED; memcheck FAILED; parity passed; decode measured" in result.output

    def lost(self: Bench, point: Point, seconds: float, seed: int) -> list[Any]:
        raise DeviceLost("after AcceleratorError: illegal memory access")

    monkeypatch.setattr(Bench, "rows", lost)
    result = command("--out", str(tmp_path), "--stages", "decode")
    assert result.exit_code == 1
    assert "decode FAILED: the device was lost after AcceleratorError" in result.output


@pytest.mark.usefixtures("pretended_gpu")
def test_an_interruption_keeps_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Bench, point: Point, seconds: float, seed: int) -> list[Any]:
        raise KeyboardInterrupt

    said: list[Any] = []
    monkeypatch.setattr(Bench, "rows", interrupted)
    monkeypatch.setattr(gpu.Outcome, "write_summary", lambda self, environment, notes: said.extend(notes))
    assert command("--out", str(tmp_path), "--stages", "tests,decode").exit_code != 0
    assert said == ["tests passed", "decode interrupted"]


def test_comparisons() -> None:
    points = {"a": {OURS: 10.0, AGAIN: 11.0, NO_PREFIX: 8.0, "x": 40.0, "y": 20.0}, "b": {OURS: 10.0, "x": 5.0}}
    found = {c.other: c for c in comparisons(points)}
    assert list(found) == ["best peer", "x", "y", NO_PREFIX, AGAIN]
    assert found["best peer"].geometric_mean == pytest.approx(1.0)
    assert (found["best peer"].worst, found["best peer"].worst_at) == (0.5, "b")
    assert (found["y"].points, found["y"].worst) == (1, 2.0)
    assert comparisons({"a": {"x": 1.0}}) == []
    assert "## " not in summary.markdown([], ENVIRONMENT)


def test_environment_without_git_or_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "output", lambda command: None)
    assert record.git_state() == ("unknown", False)
    assert Environment.read(torch.device("cpu")).file_name.endswith("-unknown")
    assert record.package_version("no-such-package-here") == "unknown"


def test_output_of_a_missing_command() -> None:
    assert record.output(["no-such-command-here"]) is None
