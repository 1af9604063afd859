"""``make gpu``: tests and timings on a machine with a GPU, in one command that ends within its budget.

    python -m benchmarks.gpu --budget 510 --stages tests,determinism,memcheck,parity,decode,prefill,mixed,generate

Stages run in that order, each within its share of what is left; what does not fit is named as left out. Rows go to
``benchmarks/results/<device>/<date>-<commit>.jsonl`` as they are measured, and a summary beside them is made from all
rows of the file, so that a run can be continued with ``--stages``. Kernels that will be timed are compiled beside the
tests (benchmarks/warm.py), and FlashInfer's where it is installed; what of the latter is not compiled when timing
begins is left out.

Exit code: 0; 1 when a test fails or is cut short, a result of ours is wrong, or a kernel of ours does not run; 2
without a GPU.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated

import typer

from . import record
from .compare import DeviceLost
from .options import RESULTS, Commit, Out
from .run import Outcome, make_bench, run_attention, run_generate

#: Arguments of pytest for each stage that is one.
TESTS = {
    "tests": [
        "tests/test_backends.py::TestTriton",
        "tests/test_backends.py::TestTritonGrouped",
        "tests/kernels/test_contract.py",
        "tests/kernels/test_edges.py",
        "tests/test_plan.py",
        "tests/gpu/test_large_offsets.py",
        # about imports, not about the device: PyTorch itself may import Triton where there is a GPU
        "--deselect=tests/kernels/test_contract.py::test_registration_needs_no_triton",
    ],
    "determinism": ["tests/gpu/test_determinism.py"],
    "memcheck": [
        "tests/kernels/test_edges.py",
        "tests/test_plan.py",
        "-k",
        "own_keys_around or prefix_around or gathered_rows or (test_plan and tile_edges)",
    ],
    # models on the device, and whatever else runs only there
    "parity": [
        "tests/gpu",
        "--ignore=tests/gpu/test_determinism.py",
        "--ignore=tests/gpu/test_large_offsets.py",
    ],
}


@dataclass(frozen=True)
class Stage:
    """What a stage needs at least and may take at most, and its weight when timing stages share what is left."""

    least_seconds: float
    weight: float = 0.0
    most_seconds: float = math.inf


STAGES = {
    "tests": Stage(least_seconds=60),
    "determinism": Stage(least_seconds=20, most_seconds=60),
    "memcheck": Stage(least_seconds=20, most_seconds=60),
    "parity": Stage(least_seconds=40),
    "decode": Stage(least_seconds=45, weight=3),
    "prefill": Stage(least_seconds=20, weight=1),
    "mixed": Stage(least_seconds=20, weight=1),
    "generate": Stage(least_seconds=40, weight=1.5),
}


@dataclass
class Budget:
    """Seconds of wall time for the stages chosen, from now on."""

    seconds: float
    stages: list[str]
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.started + self.seconds - time.monotonic()

    def share(self, stage: str) -> float | None:
        """Seconds for a stage that starts now, those after it considered; None if it does not fit."""
        after = [STAGES[name] for name in self.stages[self.stages.index(stage) + 1 :]]
        weight = STAGES[stage].weight
        if weight:
            share = self.left * weight / (weight + sum(s.weight for s in after))
        else:
            share = self.left - sum(s.least_seconds for s in after)
        return min(share, STAGES[stage].most_seconds) if share >= STAGES[stage].least_seconds else None


def run_tests(targets: list[str], seconds: float, under: Sequence[str] = ()) -> bool:
    """Pytest in a process of its own, in parallel where it can; False when a test fails or time runs out.

    ``under`` is a command that runs another and looks at it; then one process has to do.
    """
    workers = min(12, 3 * (os.cpu_count() or 1) // 4)  # most of a test is a compilation
    parallel = ["-n", str(workers)] if find_spec("xdist") and workers > 1 and not under else []
    # Warnings are errors where the tests are developed, not with whatever versions a machine has.
    command = [*under, sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "default", *parallel, *targets]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUT_SHORT"] = "1"  # perhaps: tests say at once what fails
    if under:  # a cache of memory would hide reads beyond a tensor's end
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    process = subprocess.Popen(command, cwd=record.ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        print(f"cut short after {seconds:.0f} s: these tests have not passed", flush=True)
        return False
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process of ours and whatever it has started that still runs."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def sanitizer() -> list[str] | None:
    """NVIDIA's memory checker as a command, or None if it is not on this machine."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    return [found, "--tool", "memcheck", "--error-exitcode", "1"] if found else None


@dataclass
class Compilations:
    """What is compiled in processes of their own while the tests run."""

    kernels: subprocess.Popen[bytes] | None = None
    flashinfer: subprocess.Popen[bytes] | None = None

    @classmethod
    def begin(cls, stages: Sequence[str]) -> Compilations:
        """For these stages; nothing where none is timed, and no FlashInfer where it is not installed."""
        suites = [stage for stage in stages if stage not in TESTS and stage != "generate"]
        if not suites:
            return cls()
        commands = [["benchmarks.warm", "--suites", ",".join(suites)]]
        if find_spec("flashinfer") is not None:
            commands.append(["benchmarks.peers.flashinfer"])
        return cls(*(
            subprocess.Popen([sys.executable, "-m", *command], cwd=record.ROOT, start_new_session=True)
            for command in commands
        ))  # fmt: skip

    def wait(self, seconds: float) -> list[str]:
        """Wait for the kernels, and for nothing else; what has not been compiled."""
        left_out = []
        if self.kernels is not None:
            try:
                self.kernels.wait(seconds)
            except subprocess.TimeoutExpired:
                left_out.append("kernels were still being compiled when timing began")
        if self.flashinfer is not None and self.flashinfer.poll() is None:
            left_out.append("FlashInfer's kernels were not all compiled in time")
        self.end()
        return left_out

    def end(self) -> None:
        for process in (self.kernels, self.flashinfer):
            if process is not None:
                end(process)
        self.kernels = self.flashinfer = None


def chosen(stages: str) -> list[str]:
    """The stages of a comma-separated list, in the order they run."""
    names = {name.strip() for name in stages.split(",") if name.strip()}
    if not names or names - STAGES.keys():
        raise typer.BadParameter(f"expected some of {', '.join(STAGES)}, got {stages!r}")
    return [name for name in STAGES if name in names]


def main(
    stages: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(STAGES)}")] = ",".join(STAGES),
    budget: Annotated[float, typer.Option(help="seconds for everything")] = 510,
    out: Out = RESULTS,
    commit: Commit = None,
) -> None:
    """Run the stages on the first GPU and say what was found."""
    limits = Budget(budget, chosen(stages))
    device = record.first_gpu("benchmarks.gpu")
    environment = record.Environment.read(device, commit)
    print(environment, flush=True)
    outcome = Outcome(environment.path(out))

    compilations = Compilations.begin(limits.stages)
    gc.freeze()  # a capture of a graph may collect garbage: what is imported by now need not be looked through
    fine, notes, bench = True, list[str](), None
    try:
        for stage in limits.stages:
            share = limits.share(stage)
            if share is None:
                notes.append(f"{stage} left out: only {limits.left:.0f} s remained")
                continue
            start = time.monotonic()
            print(f"== {stage}: at most {share:.0f} s", flush=True)
            try:
                if stage in TESTS:
                    under = sanitizer() if stage == "memcheck" else []
                    if under is None:
                        notes.append("memcheck left out: compute-sanitizer is not on this machine")
                        continue
                    passed = run_tests(TESTS[stage], share, under)
                    notes.append(f"{stage} {'passed' if passed else 'FAILED'}")
                else:
                    notes += compilations.wait(share / 2)
                    had_failed, outcome.left_out = outcome.failed, []
                    if stage == "generate":
                        run_generate(outcome, device, environment, quick=False, seconds=share)
                    else:
                        bench = bench or make_bench(device, environment, quick=False)
                        print(bench.roofs, flush=True)
                        run_attention(outcome, bench, stage, False, share - (time.monotonic() - start))
                    passed = had_failed or not outcome.failed
                    notes += [f"{stage} {'measured' if passed else 'FAILED'}", *outcome.left_out]
            except DeviceLost as e:
                passed = False
                notes.append(f"{stage} FAILED: the device was lost {e}")
            except KeyboardInterrupt:
                notes.append(f"{stage} interrupted")
                raise
            fine = fine and passed
            print(f"== {stage} took {time.monotonic() - start:.1f} s", flush=True)
    finally:
        compilations.end()
        page = outcome.write_summary(environment, notes)
        if page is not None:
            print(page, flush=True)
            print(f"rows in {outcome.path}", flush=True)
    gc.unfreeze()
    print(f"{'; '.join(notes)}; {budget - limits.left:.0f} s in all", flush=True)
    raise typer.Exit(0 if fine else 1)


if __name__ == "__main__":
    typer.run(main)
