"""Search tile configs on this GPU, within a time budget, and write the best to ``kernels/configs/<gpu>.json``.

    python -m benchmarks.tune --budget 480 --kinds decode,grouped,prefill --head-dims 64,128,256

The space is every tile shape of `SPACE` for each kernel, head dimension and dtype; all are compiled first, side by
side. A candidate that overflows shared memory or spills registers is dropped before it is run; one whose result is
wrong is never timed. Candidates are timed against each other on a few workloads, and the one with the least geometric
mean of times is kept; the heuristic's is kept unless another is `GAIN` faster. All timings, and why the others have
none, are appended to ``kernels/configs/<gpu>.timings.jsonl``, which the kernels do not read.

Exit code: 0; 1 when the device fails; 2 without a GPU.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from prefix_attn.kernels import config as configs
from prefix_attn.kernels.config import TileConfig
from prefix_attn.plan import TILE_ROWS

from . import compile_report
from .options import Commit
from .peers import Point, Problem
from .peers.check import Reference
from .record import Environment, first_gpu
from .timing import Runner, first_line, input_sets, measure, runner_for

#: Query rows, keys, warps and stages of a tile. Where rows are 0 they follow from the call, and are not searched.
SPACE: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": {"block_m": (0,), "block_n": (16, 32, 64, 128), "num_warps": (2, 4), "num_stages": (2, 3, 4)},
    "decode_few": {"block_m": (0,), "block_n": (16, 32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4)},
    "grouped": {"block_m": (0,), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "prefill": {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
}

#: (batch, tasks, m, n) to time on: where each kernel is used, in memory, in between, and bound by arithmetic.
WORKLOADS = {
    "decode": ((64, 8, 128, 512), (256, 8, 32, 64), (64, 64, 1024, 64), (64, 8, 128, 64)),
    "decode_few": ((16, 8, 128, 512), (16, 1, 32, 64), (1, 1, 8192, 512)),
    "grouped": ((64, 1, 8192, 64), (64, 8, 1024, 512), (256, 8, 8192, 512)),
    "prefill": ((4, 1, 1024, 4096), (16, 4, 1024, 512), (64, 8, 128, 64)),
}

#: Query and kv heads that models have at a head dimension: GPT-2, Llama-3, Gemma-2.
HEADS = {64: (12, 12), 128: (32, 8), 256: (16, 8)}

#: How much faster than the heuristic's another config must be to replace it: more than the noise.
GAIN = 0.02

#: Seconds below which a target is not begun, its candidates being compiled.
MIN_SECONDS = 8.0


@dataclass(frozen=True)
class Target:
    """What one entry of the file is for; block_m as in `configs.heuristic`."""

    kind: str
    head_dim: int
    dtype: str
    block_m: int

    @classmethod
    def of(cls, kind: str, head_dim: int, dtype: str) -> Target:
        q_heads, kv_heads = HEADS[head_dim]
        few = configs.decode_rows(q_heads // kv_heads)
        rows = {"decode": few, "decode_few": few, "grouped": TILE_ROWS}
        return cls(kind, head_dim, dtype, rows.get(kind, 0))

    @property
    def key(self) -> str:
        return configs.tuned_key(self.kind, self.head_dim, getattr(torch, self.dtype), self.block_m)

    @property
    def itemsize(self) -> int:
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def points(self) -> list[Point]:
        op = "prefill" if self.kind == "prefill" else "decode"
        return [Point(op, *sizes, *HEADS[self.head_dim], self.head_dim, self.dtype) for sizes in WORKLOADS[self.kind]]

    def heuristic(self, target: str) -> TileConfig:
        return configs.heuristic(self.kind, self.head_dim, self.itemsize, target, self.block_m)

    def candidates(self, target: str) -> list[TileConfig]:
        """The heuristic's config, then all of the space that fits shared memory."""
        space = SPACE[self.kind]
        rows = [rows or self.block_m for rows in space["block_m"]]
        shapes = product(rows, space["block_n"], space["num_warps"], space["num_stages"])
        limit = configs.shared_limit(target)
        fitting = [
            tile for tile in (TileConfig(*shape) for shape in shapes)
            if configs.shared_bytes(self.kind, tile, self.head_dim, self.itemsize, target) <= limit
        ]  # fmt: skip
        return list(dict.fromkeys([self.heuristic(target), *fitting]))

    def spill(self, tile: TileConfig, target: str) -> str | None:
        """Why the compiler makes the candidate unfit; None if it does not. Needs no GPU."""
        q_heads, kv_heads = HEADS[self.head_dim]
        rows = 0 if self.kind == "prefill" else q_heads // kv_heads
        job = compile_report.Job(self.kind, target, self.head_dim, self.dtype, rows=rows, group=q_heads // kv_heads)
        row = compile_report.compile_job(job, asdict(tile))
        if row.error:
            return row.error
        if row.shared > configs.shared_limit(target):
            return f"{row.shared} bytes of shared memory"
        return f"{row.spills} bytes of registers spilled per thread" if row.spills else None


@dataclass(frozen=True)
class Result:
    """One candidate on one workload; without a time, ``status`` says why."""

    key: str
    config: TileConfig
    workload: str
    status: str
    median_us: float | None = None


#: ``(problem, tile) -> call``: how a candidate is run.
Launch = Callable[[Problem, TileConfig], Callable[[], Tensor]]

#: ``runners, seconds -> median microseconds``: how candidates are timed against each other.
Clock = Callable[[Mapping[str, Runner], float], Mapping[str, float]]


def launch(
    kind: str, problem: Problem, tile: TileConfig | None = None, chunks: int | None = None
) -> Callable[[], Tensor]:  # fmt: skip
    """A call of one kernel with this config, and its keys (in grouped decode the prefixes') in so many chunks."""
    from prefix_attn.kernels.decode import decode_attention
    from prefix_attn.kernels.grouped import grouped_attention
    from prefix_attn.kernels.prefill import prefill_attention
    from prefix_attn.plan import row_tiles

    call, prefix = problem.call, problem.prefix
    tiles = row_tiles(call.task_ids, prefix.lens, call.q_len * call.group) if kind == "grouped" else None
    both = None if chunks is None else (chunks, 1)

    def run() -> Tensor:
        out = torch.empty_like(call.q)
        if tiles is not None:
            grouped_attention(call, *tiles, out, None, max_len=prefix.expected_max_len, config=tile, chunks=both)
        elif kind.startswith("decode"):
            decode_attention(call, out, None, config=tile, chunks=chunks)
        else:
            prefill_attention(call, out, None, config=tile)
        return out

    return run


def clock(runners: Mapping[str, Runner], seconds: float) -> dict[str, float]:
    timings = measure(runners, seconds, random.Random(0))
    return {name: timing.median_us for name, timing in timings.items()}


def try_candidates(
    target: Target, tiles: Iterable[TileConfig], device: torch.device, seconds: float, run: Launch, clock: Clock
) -> list[Result]:
    """Check and time candidates on every workload of the target, about ``seconds`` in all."""
    results, left = [], list(tiles)
    deadline = time.monotonic() + seconds
    for i, point in enumerate(target.points):
        until = time.monotonic() + (deadline - time.monotonic()) / (len(target.points) - i)
        first = Problem.random(point, device, seed=i)
        touched = sum(x.numel() * x.element_size() for x in (first.q, first.k, first.v, first.prefix.k, first.prefix.v))
        problems = [first, *(Problem.random(point, device, 100 + s) for s in range(1, input_sets(touched, device)))]
        reference = Reference.of(first)
        runners: dict[str, Runner] = {}
        for tile in tqdm(left, desc=f"{target.key} {point}", leave=False, disable=None):
            status = "left out for want of time" if time.monotonic() > until and runners else ""
            status = status or _prepare(tile, problems, reference, device, run, runners)
            if status:
                results.append(Result(target.key, tile, str(point), status))
        if runners:
            times = clock(runners, max(0.0, until - time.monotonic()))
            results += [
                Result(target.key, tile, str(point), "ok", times[str(tile)]) for tile in left if str(tile) in times
            ]
        left = [tile for tile in left if str(tile) in runners]  # what failed once is no choice
    return results


def _prepare(
    tile: TileConfig, problems: list[Problem], reference: Reference, device: torch.device, run: Launch,
    runners: dict[str, Runner],
) -> str:  # fmt: skip
    """Add the candidate's runner, or say why not."""
    try:
        calls = [run(problem, tile) for problem in problems]
        _, wrong = reference.check(calls[0](), problems[0])
        if wrong is not None:
            return f"wrong: {wrong}"
        runners[str(tile)] = runner_for(calls, device)[0]
    except Exception as e:  # the compiler's and the driver's own errors, of many types
        return f"refused: {type(e).__name__}: {first_line(e)}"
    return ""


def best(results: list[Result], heuristic: TileConfig) -> TileConfig | None:
    """The fastest over all workloads, or the heuristic's if that is within `GAIN`; None if none has all times."""
    workloads = {result.workload for result in results}
    times: dict[TileConfig, list[float]] = {}
    for result in results:
        if result.median_us is not None:
            times.setdefault(result.config, []).append(result.median_us)
    means = {
        tile: math.exp(sum(map(math.log, some)) / len(some))
        for tile, some in times.items() if len(some) == len(workloads)
    }  # fmt: skip
    if not means:
        return None
    fastest = min(means, key=means.__getitem__)
    return heuristic if means.get(heuristic, math.inf) <= means[fastest] * (1 + GAIN) else fastest


def write(path: Path, chosen: Mapping[str, TileConfig], results: Iterable[Result], environment: Environment) -> None:
    """Replace the chosen entries of the file, and append all results beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text()) if path.is_file() else {}
    entries |= {key: asdict(tile) for key, tile in chosen.items()}
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    with path.with_suffix(".timings.jsonl").open("a") as file:
        file.writelines(json.dumps(asdict(result) | asdict(environment)) + "\n" for result in results)


def examine(target: Target, tile: TileConfig, name: str) -> str | None:
    """`Target.spill`; what passes is launched once where there is a GPU, so that the timings find it compiled."""
    why = target.spill(tile, name)
    if why is None and torch.cuda.is_available():
        for point in target.points:
            with torch.no_grad(), suppress(Exception):  # whatever it is, it happens again where it is reported
                launch(target.kind, Problem.random(point, torch.device("cuda", 0), seed=0), tile)()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return why


def unfit(target: Target, tiles: list[TileConfig], name: str, pool: Pool) -> dict[TileConfig, str]:
    """Candidates that the compiler makes unfit, and why; compiled side by side, in processes that do not interpret."""
    found = pool.imap(partial(examine, target, name=name), tiles)
    bar = tqdm(found, total=len(tiles), desc=f"{target.key} compiling", leave=False, disable=None)
    return {tile: why for tile, why in zip(tiles, bar, strict=True) if why is not None}


def some_of(names: str, known: Iterable[str]) -> list[str]:
    """The parts of a comma-separated option, each of which must be known."""
    found, all_known = [name.strip() for name in names.split(",")], list(known)
    if set(found) - set(all_known):
        raise typer.BadParameter(f"expected some of {', '.join(all_known)}, got {names!r}")
    return found


def main(
    kinds: Annotated[str, typer.Option(help="comma-separated, of decode, decode_few, grouped, prefill")] = ",".join(
        SPACE
    ),
    head_dims: Annotated[str, typer.Option(help="comma-separated, of 64, 128, 256")] = "128,64,256",
    dtypes: Annotated[str, typer.Option(help="comma-separated names of PyTorch's")] = "bfloat16",
    budget: Annotated[float, typer.Option(help="seconds for everything")] = 480,
    processes: Annotated[int, typer.Option(help="compilations at a time")] = max(1, (os.cpu_count() or 2) - 2),
    commit: Commit = None,
) -> None:
    """Tune the first GPU."""
    types, dims = some_of(dtypes, ("float16", "bfloat16", "float32")), some_of(head_dims, map(str, HEADS))
    wanted = [
        Target.of(kind, int(head_dim), dtype) for dtype, head_dim, kind in product(types, dims, some_of(kinds, SPACE))
    ]
    device = first_gpu("benchmarks.tune")
    name, path, environment = configs.target_of(device), configs.tuned_file(device), Environment.read(device, commit)
    deadline = time.monotonic() + budget
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        dropped = {target: unfit(target, target.candidates(name), name, pool) for target in wanted}
    for i, target in enumerate(wanted):
        share = (deadline - time.monotonic()) / (len(wanted) - i)
        if share < MIN_SECONDS:
            print(f"left out for want of time: {', '.join(t.key for t in wanted[i:])}", flush=True)
            break
        results = [Result(target.key, tile, "", why) for tile, why in dropped[target].items()]
        fit = [tile for tile in target.candidates(name) if tile not in dropped[target]]
        try:
            with torch.no_grad():
                timed = try_candidates(target, fit, device, share, partial(launch, target.kind), clock)
            torch.cuda.empty_cache()
        except RuntimeError as e:  # a candidate left the device unusable, or no workload fits its memory
            write(path, {}, results, environment)
            typer.echo(
                f"{target.key}: {type(e).__name__}: {first_line(e)}; {path} holds what was tuned before", err=True
            )
            raise typer.Exit(1) from e
        chosen = best(timed, target.heuristic(name))
        write(path, {} if chosen is None else {target.key: chosen}, [*results, *timed], environment)
        said = chosen or "no candidate was timed on every workload"
        print(f"{target.key}: {len(fit)} candidates fit; {said}", flush=True)
    print(f"{path}", flush=True)


if __name__ == "__main__":
    typer.run(main)
