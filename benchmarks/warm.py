"""Compile the kernels that timings will launch, side by side and beforehand, into Triton's cache on disk.

    python -m benchmarks.warm --suites decode,prefill,mixed

A kernel is compiled when it is first launched, for seconds, on one core. Each point of the suites is therefore run once
by every provider that compiles, in one of several processes. What goes wrong here is left for the timings to report.

Exit code: 0; 2 without a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import suppress
from typing import Annotated

import torch
import typer

from .peers import OwnKernel, Peer, Point, Problem, all_peers
from .record import first_gpu
from .suites import SUITES, attention_points

#: Processes at most: each holds a context on the device, and the memory of one point.
MAX_PROCESSES = 8


def processes() -> int:
    """How many processes compile side by side: a few cores are left to others."""
    return max(1, min(MAX_PROCESSES, (os.cpu_count() or 1) - 4))


def compiling() -> list[Peer]:
    """The providers whose kernels Triton compiles and keeps."""
    return [peer for peer in all_peers() if peer.ours or isinstance(peer, OwnKernel)]


def run_once(point: Point) -> None:
    """One call of every provider that compiles, at one point."""
    device = torch.device("cuda", 0)
    with torch.no_grad(), suppress(torch.OutOfMemoryError):
        problem = Problem.random(point, device, seed=0)
        for peer in compiling():
            if peer.unavailable(device) is None and peer.unsuited(point) is None:
                with suppress(Exception):  # whatever it is, it happens again where it is reported
                    peer.prepare(problem)()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def main(
    suites: Annotated[str, typer.Option(help="comma-separated, of decode, prefill, mixed")] = "decode,prefill,mixed",
) -> None:
    """Run every point of the suites once on the first GPU."""
    names = [name.strip() for name in suites.split(",")]
    if not set(names) <= set(SUITES) - {"generate"}:
        raise typer.BadParameter(f"expected some of decode, prefill, mixed, got {suites!r}")
    first_gpu("benchmarks.warm")
    points = [p for name in names for p in attention_points(name, on_gpu=True, quick=False)]
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(processes()) as pool:
        for _ in pool.imap_unordered(run_once, dict.fromkeys(points)):
            pass
    print(f"kernels compiled for {len(points)} points in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
