"""Time decode with its keys cut into one chunk, two, and so on: what `prefix_attn.kernels.chunks` is fitted to.

    python -m benchmarks.chunks

Prints microseconds per call at each point, those of the package's own choice first, for inline decode and for the
prefixes of grouped decode (own keys in one chunk). Needs a GPU; takes a minute.

Exit code: 0; 2 without a GPU.
"""

from __future__ import annotations

import random

import torch
import typer

from prefix_attn.cost import Cost

from .peers import Point, Problem
from .record import Environment, first_gpu
from .timing import input_sets, measure, runner_for
from .tune import launch

CHUNKS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)

#: (batch, tasks, m, n), with Llama-3's heads.
INLINE = ((1, 1, 1024, 64), (16, 1, 1024, 64), (64, 8, 1024, 64), (64, 8, 128, 64), (64, 8, 32, 512), (16, 8, 128, 512),
          (64, 64, 128, 64), (256, 8, 32, 64), (16, 8, 128, 4096), (64, 8, 128, 4096))  # fmt: skip
GROUPED = ((16, 1, 1024, 64), (64, 8, 1024, 64), (256, 1, 1024, 64), (64, 1, 8192, 512), (256, 8, 8192, 512))

REPEATS, SECONDS = 3, 0.5


def sweep(point: Point, grouped: bool, device: torch.device) -> dict[str, float]:
    """Microseconds by number of chunks, "auto" for the package's own choice."""
    first = Problem.random(point, device, seed=0)
    sets = input_sets(Cost.of(first.call).bytes, device)
    problems = [first, *(Problem.random(point, device, seed) for seed in range(1, sets))]
    runners = {}
    for chunks in (None, *CHUNKS):
        calls = [launch("grouped" if grouped else "decode", problem, chunks=chunks) for problem in problems]
        runners[str(chunks or "auto")] = runner_for(calls, device)[0]
    timings = measure(runners, SECONDS, random.Random(0), REPEATS)
    return {name: timing.median_us for name, timing in timings.items()}


def main() -> None:
    """Sweep on the first GPU."""
    device = first_gpu("benchmarks.chunks")
    print(Environment.read(device))
    for way, points in (("inline", INLINE), ("grouped", GROUPED)):
        for sizes in points:
            point = Point("decode", *sizes)
            with torch.no_grad():
                times = sweep(point, way == "grouped", device)
            print(f"{way}, {point}\n    " + "  ".join(f"{name}: {us:.1f}" for name, us in times.items()), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
