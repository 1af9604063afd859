"""``make gpu``: tests, parity and timings on a machine with a GPU, in one command that ends within its budget.

    python -m benchmarks.gpu --budget 510 --stages tests,parity,decode,prefill,mixed,generate

Stages run in that order, each within its share of what is left; what does not fit is named as left out. Rows go to
``benchmarks/results/<device>/<date>-<commit>.jsonl`` as they are measured, and a summary beside them is made from all
rows of the file, so that a run can be continued with ``--stages``.

Exit code: 0; 1 when a test fails or is cut short, a result is wrong, or a kernel of ours does not run; 2 without a GPU.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import record
from .compare import DeviceLost
from .run import Outcome, make_bench, run_attention, run_generate

TESTS = [
    "tests/test_backends.py::TestTriton",
    "tests/kernels/test_contract.py",
    "tests/kernels/test_edges.py",
    "tests/gpu/test_large_offsets.py",
    # about imports, not about the device: PyTorch itself may import Triton where there is a GPU
    "--deselect=tests/kernels/test_contract.py::test_registration_needs_no_triton",
]
PARITY = ["tests/gpu/test_patch_on_device.py"]


@dataclass(frozen=True)
class Stage:
    """What a stage needs at least, and its weight when timing stages share what is left; tests take what they need."""

    least_seconds: float
    weight: float = 0.0


STAGES = {
    "tests": Stage(least_seconds=60),
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
        return share if share >= STAGES[stage].least_seconds else None


def run_tests(targets: list[str], seconds: float) -> bool:
    """Pytest in a process of its own, in parallel where it can; False when a test fails or time runs out."""
    workers = min(8, (os.cpu_count() or 1) // 2)
    parallel = ["-n", str(workers)] if find_spec("xdist") and workers > 1 else []
    # Warnings are errors where the tests are developed, not with whatever versions a machine has.
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", *parallel, *targets]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        return subprocess.run(command, cwd=record.ROOT, env=environment, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"cut short after {seconds:.0f} s: these tests have not passed", flush=True)
        return False


def chosen(stages: str) -> list[str]:
    """The stages of a comma-separated list, in the order they run."""
    names = {name.strip() for name in stages.split(",") if name.strip()}
    if not names or names - STAGES.keys():
        raise typer.BadParameter(f"expected some of {', '.join(STAGES)}, got {stages!r}")
    return [name for name in STAGES if name in names]


def main(
    stages: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(STAGES)}")] = ",".join(STAGES),
    budget: Annotated[float, typer.Option(help="seconds for everything")] = 510,
    out: Annotated[Path, typer.Option(help="folder for results")] = record.ROOT / "benchmarks" / "results",
    commit: Annotated[str | None, typer.Option(help="what to call this checkout, if it is without git")] = None,
) -> None:
    """Run the stages on the first GPU and say what was found."""
    limits = Budget(budget, chosen(stages))
    if not torch.cuda.is_available():
        typer.echo("benchmarks.gpu needs a GPU that PyTorch can use, and finds none; nothing was run", err=True)
        raise typer.Exit(2)
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    environment = record.Environment.read(device, commit)
    print(environment, flush=True)
    outcome = Outcome(out / environment.slug / f"{environment.file_name}.jsonl")

    gc.freeze()  # a capture of a graph may collect garbage: what is imported by now need not be looked through
    fine, notes, bench = True, list[str](), None
    for stage in limits.stages:
        share = limits.share(stage)
        if share is None:
            notes.append(f"{stage} left out: only {limits.left:.0f} s remained")
            continue
        start = time.monotonic()
        print(f"== {stage}: at most {share:.0f} s", flush=True)
        try:
            if stage in ("tests", "parity"):
                passed = run_tests(TESTS if stage == "tests" else PARITY, share)
                notes.append(f"{stage} {'passed' if passed else 'FAILED'}")
            else:
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
        fine = fine and passed
        print(f"== {stage} took {time.monotonic() - start:.1f} s", flush=True)

    page = outcome.write_summary(environment, notes)
    if page is not None:
        print(page, flush=True)
        print(f"rows in {outcome.path}", flush=True)
    gc.unfreeze()
    print(f"{'; '.join(notes)}; {budget - limits.left:.0f} s in all", flush=True)
    raise typer.Exit(0 if fine else 1)


if __name__ == "__main__":
    typer.run(main)
