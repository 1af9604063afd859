"""Does reading a shared prefix once pay on a CPU, or should each row get a copy? Both ways of the torch backend, timed.

Decode and prefill at GPT-2's and Llama-3's head shapes; the two ways alternate in one process and must agree first.

    python -m benchmarks.sharing        # about a minute; writes benchmarks/results/cpu/sharing.{jsonl,md}
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from prefix_attn.backends import torch_sdpa
from prefix_attn.checks import checked_call
from prefix_attn.types import AttentionCall, PrefixKV

from .record import Environment

RESULTS = Path(__file__).parent / "results" / "cpu"
SHAPES: dict[str, tuple[int, int, int, torch.dtype]] = {
    "GPT-2": (12, 12, 64, torch.float32),
    "Llama-3": (32, 8, 128, torch.bfloat16),
}
BATCHES = ((1, 1), (4, 1), (16, 1), (16, 4), (16, 16))  # rows, tasks
PREFIXES = (20, 128, 1024)
QUERIES = (1, 32)
OWN_KEYS = 64
REPEATS, SECONDS = 5, 0.05


def main(threads: Annotated[int, typer.Option(help="CPU threads.")] = 2) -> None:
    """Time both ways on every point of the grid and write a table of speed-ups."""
    torch.set_num_threads(threads)
    rows = []
    for name, (batch, tasks), m, q_len in tqdm(list(product(SHAPES, BATCHES, PREFIXES, QUERIES))):
        shape = SHAPES[name]
        call = random_call(shape, batch, tasks, m, q_len)
        host = torch_sdpa._Batch(call)
        shared, copied = alternate(
            partial(torch_sdpa._shared, call, host), partial(torch_sdpa._concatenated, call, host)
        )
        rows.append({"heads": name, "dtype": str(shape[3]), "rows": batch, "tasks": tasks, "m": m, "q_len": q_len,
                     "n": max(OWN_KEYS, q_len), "shared_us": shared, "copied_us": copied})  # fmt: skip
    write(rows, Environment.read(torch.device("cpu")), threads)


def random_call(shape: tuple[int, int, int, torch.dtype], batch: int, tasks: int, m: int, q_len: int) -> AttentionCall:
    """One call with rows dealt to the tasks in turn."""
    q_heads, kv_heads, dim, dtype = shape

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    prefix = PrefixKV.pack([(randn(kv_heads, m, dim), randn(kv_heads, m, dim)) for _ in range(tasks)])
    k, v = randn(batch, kv_heads, OWN_KEYS, dim), randn(batch, kv_heads, OWN_KEYS, dim)
    return checked_call(randn(batch, q_heads, q_len, dim), k, v, prefix, [row % tasks for row in range(batch)])


def alternate(*ways: Callable[[], tuple[Tensor, Tensor]]) -> list[float]:
    """Median microseconds of each way, A/B/A/B; raises if their results differ by more than rounding."""
    first, second = (way()[0].float() for way in ways)
    torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)
    medians: list[list[float]] = [[] for _ in ways]
    for _ in range(REPEATS):
        for way, seconds in zip(ways, medians, strict=True):
            times: list[float] = []
            begin = time.perf_counter()
            while len(times) < 3 or time.perf_counter() - begin < SECONDS:
                start = time.perf_counter()
                way()
                times.append(time.perf_counter() - start)
            seconds.append(statistics.median(times))
    return [1e6 * statistics.median(seconds) for seconds in medians]


def write(rows: list[dict[str, Any]], environment: Environment, threads: int) -> None:
    """Append the rows to sharing.jsonl and make sharing.md of them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "sharing.jsonl").open("a") as file:
        file.writelines(json.dumps(row | asdict(environment) | {"threads": threads}) + "\n" for row in rows)
    ratios = [row["copied_us"] / row["shared_us"] for row in rows]
    lines = [
        "# Sharing a prefix against copying it, on a CPU\n",
        f"Made by `python -m benchmarks.sharing`; commit {environment.commit}, torch {environment.torch_version}, "
        f"{threads} threads, {OWN_KEYS} own keys. Time of copying over time of sharing: above 1, sharing wins.",
        f"Geometric mean {statistics.geometric_mean(ratios):.2f}, worst {min(ratios):.2f}.\n",
        "| heads | rows x tasks | queries | " + " | ".join(f"m = {m}" for m in PREFIXES) + " |",
        "|---|---|--:|" + "--:|" * len(PREFIXES),
    ]
    for name, (batch, tasks), q_len in product(SHAPES, BATCHES, QUERIES):
        key = (name, batch, tasks, q_len)
        cells = [
            f"{ratio:.2f}"
            for row, ratio in zip(rows, ratios, strict=True)
            if (row["heads"], row["rows"], row["tasks"], row["q_len"]) == key
        ]
        lines.append(f"| {name} | {batch} x {tasks} | {q_len} | " + " | ".join(cells) + " |")
    (RESULTS / "sharing.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
