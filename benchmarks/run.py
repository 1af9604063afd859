"""Run suites within a budget: roofs first, then point after point, every row stored as soon as it is known.

Each suite gets its share of the time that is left. What does not fit, and what a device has no memory for, is named.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from . import record, summary
from .compare import Bench
from .peers import AGAIN, OURS, Peer, Point, all_peers, cpu_peers
from .peers.peft import peft_cannot_generate
from .roofs import Roofs, measure_roofs
from .suites import SUITES, attention_points, generations

#: Seconds a suite takes unless a budget says otherwise.
SECONDS = {"decode": 330.0, "prefill": 80.0, "mixed": 110.0, "generate": 280.0}
QUICK_SECONDS = {"decode": 30.0, "prefill": 7.0, "mixed": 10.0, "generate": 25.0}


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        path: where the rows of attention are, JSON lines; those of generation are beside it. None: nothing is stored.
        rows: of this run, in order, by suite.
        generated: rows of "generate".
        left_out: what was not measured, and why.
        interrupted: whether the user stopped it.
        absent: peers that no point was given to, since they need another device, each with the reason.
        roofs: what the device sustains.
    """

    path: Path | None
    rows: dict[str, list[record.Row]] = field(default_factory=dict)
    generated: list[record.GenerationRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    interrupted: bool = False
    roofs: Roofs | None = None

    @property
    def measured(self) -> bool:
        """Whether there is a row at all."""
        return any(self.rows.values()) or bool(self.generated)

    @property
    def failed(self) -> bool:
        """Whether a result of ours was wrong, or a kernel of ours did not run; what others do is their own affair."""
        failed = [row.provider for rows in self.rows.values() for row in rows if row.failed]
        failed += [row.provider for row in self.generated if row.failed]
        return any(provider.startswith(OURS) for provider in failed)

    def write_summary(self, environment: record.Environment, notes: Sequence[str]) -> str | None:
        """Keep the notes of this run; a page beside the rows, of all rows and notes there are. None without rows."""
        if self.path is None:
            return None
        stored = self.path.is_file() or record.generation_path(self.path).is_file()
        if notes and stored:
            record.append(record.notes_path(self.path), [record.Notes(environment.run, list(notes))])
        rows = record.read(self.path, record.Row)
        if not rows:
            return None
        page = summary.markdown(rows, environment, record.read_notes(self.path))
        self.path.with_suffix(".md").write_text(page)
        return page


class Clock:
    """Seconds of wall time, shared among suites in proportion to what they usually take."""

    def __init__(self, suites: Sequence[str], quick: bool, budget: float | None) -> None:
        self.weights = {suite: (QUICK_SECONDS if quick else SECONDS)[suite] for suite in suites}
        self.deadline = time.monotonic() + (sum(self.weights.values()) if budget is None else budget)

    def share(self, suite: str) -> float:
        """Seconds for a suite that starts now; what the earlier ones did not use is shared too."""
        names = list(self.weights)
        later = sum(self.weights[name] for name in names[names.index(suite) :])
        return (self.deadline - time.monotonic()) * self.weights[suite] / later


def run(suites: Sequence[str], device: torch.device, quick: bool, budget: float | None, output: Path | None,
        peers: Sequence[Peer] | None = None) -> Outcome:  # fmt: skip
    """Measure, and store where there is a folder for it; ``peers`` are all that the device has unless given.

    However it ends, what was measured is summarised; where the user interrupts it, that is what there is.
    """
    clock = Clock(suites, quick, budget)
    if device.type != "cuda":
        pin_threads()
    environment = record.Environment.read(device)
    outcome = Outcome(output and environment.path(output, quick))
    bench = None
    suite = ""
    try:
        for suite in suites:
            if suite == "generate":
                run_generate(outcome, device, environment, quick, clock.share(suite))
            else:
                bench = bench or make_bench(device, environment, quick, peers)
                run_attention(outcome, bench, suite, quick, clock.share(suite))
    except KeyboardInterrupt:
        outcome.interrupted = True
        outcome.left_out.append(f"interrupted in {suite}: the rest of it, and what comes after, is left out")
    finally:
        outcome.write_summary(environment, [*outcome.left_out, *outcome.absent])
    return outcome


def make_bench(
    device: torch.device, environment: record.Environment, quick: bool, peers: Sequence[Peer] | None = None
) -> Bench:
    """The device with its roofs in the dtypes of the grids; ``peers`` are all that there are unless given."""
    on_gpu = device.type == "cuda"
    points = [p for suite in SUITES if suite != "generate" for p in attention_points(suite, on_gpu, quick)]
    roofs = measure_roofs(device, tuple(dict.fromkeys(point.dtype for point in points)))
    return Bench(device, environment, roofs, peers or peers_for(device), repeats=7 if on_gpu else 5)


def run_attention(outcome: Outcome, bench: Bench, suite: str, quick: bool, seconds: float) -> None:
    """One suite of attention, into the outcome and its file."""
    outcome.roofs = bench.roofs
    outcome.absent = absent(bench.device)
    points = attention_points(suite, bench.device.type == "cuda", quick)
    keep = store(outcome.path, outcome.rows.setdefault(suite, []))
    outcome.left_out += run_points(bench, points, seconds, keep, suite)


def run_generate(
    outcome: Outcome, device: torch.device, environment: record.Environment, quick: bool, seconds: float
) -> None:
    """The end-to-end suite, into the outcome and its file."""
    reason = peft_cannot_generate()
    if reason is not None:
        outcome.left_out.append(f"generate left out: {reason}")
        return
    from .generate import run_generations

    keep = store(outcome.path and record.generation_path(outcome.path), outcome.generated)
    points = generations(device.type == "cuda", quick)
    outcome.left_out += run_generations(points, device, environment, seconds, keep)


def peers_for(device: torch.device) -> list[Peer]:
    """All providers that are worth timing on the device, ours first."""
    return all_peers() if device.type == "cuda" else cpu_peers()


def absent(device: torch.device) -> list[str]:
    """The peers of a GPU that a CPU's list leaves out, and why each could not run."""
    if device.type == "cuda":
        return []  # there they are in the list, and say it themselves
    reasons = {peer.name: peer.unavailable(device) for peer in all_peers() if not peer.ours}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]


def only_against(name: str, device: torch.device) -> list[Peer]:
    """Ours, twice, and the peers whose name contains ``name``; empty if there is none."""
    peers = peers_for(device)
    theirs = [peer for peer in peers if not peer.ours and name.lower() in peer.name.lower()]
    return [*(peer for peer in peers if peer.name in (OURS, AGAIN)), *theirs] if theirs else []


def store(path: Path | None, rows: list[record.AnyRow]) -> Callable[[Iterable[record.AnyRow]], None]:
    """A function that appends rows to the list, and to the file if there is one."""

    def keep(new: Iterable[record.AnyRow]) -> None:
        new = list(new)
        rows.extend(new)
        if path is not None:
            record.append(path, new)

    return keep


def run_points(
    bench: Bench, points: Sequence[Point], seconds: float, keep: Callable[[list[record.Row]], None], name: str
) -> list[str]:
    """Measure points until the time is up, handing their rows over as they come; what was left out."""
    deadline = time.monotonic() + seconds
    left_out: list[str] = []
    for i, point in enumerate(tqdm(points, desc=name, unit="point", disable=None)):
        left = deadline - time.monotonic()
        if left <= 0:
            left_out.append(f"{name} left out for want of time: {', '.join(map(str, points[i:]))}")
            break
        try:
            rows = bench.rows(point, seconds=0.6 * left / (len(points) - i), seed=1000 * i)
        except torch.OutOfMemoryError:
            left_out.append(f"{name} left out for want of memory: {point}")
            continue
        keep(rows)
        for row in rows:
            if row.failed:
                tqdm.write(f"{row.provider} at {point}: {row.status}")
    return left_out


def pin_threads() -> None:
    """Keep this process on as many cores as PyTorch has threads, where the system lets one choose."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: torch.get_num_threads()])
