"""Does reading a shared prefix once pay on a CPU, or should each row get a copy? Both ways of the torch backend, timed.

Decode and prefill at GPT-2's and Llama-3's head shapes; the two ways alternate in one process and must agree first.

    python -m benchmarks.sharing        # about a minute; writes sharing.{jsonl,md} into benchmarks/results/<device>
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from prefix_attn.backends import torch_sdpa
from prefix_attn.checks import checked_call
from prefix_attn.types import AttentionCall, PrefixKV

from .options import RESULTS, Commit, Out, Threads
from .record import Environment, append

SHAPES: dict[str, tuple[int, int, int, torch.dtype]] = {
    "GPT-2": (12, 12, 64, torch.float32),
    "Llama-3": (32, 8, 128, torch.bfloat16),
}
BATCHES = ((1, 1), (4, 1), (16, 1), (16, 4), (16, 16))  # rows, tasks
PREFIXES = (20, 128, 1024)
QUERIES = (1, 32)
OWN_KEYS = 64
REPEATS, SECONDS = 5, 0.05


@dataclass(frozen=True)
class SharingRow:
    """Microseconds of both ways at one point: ``rows`` rows of ``q_len`` queries over ``tasks`` prefixes of ``m``."""

    heads: str
    dtype: str
    rows: int
    tasks: int
    m: int
    q_len: int
    n: int
    shared_us: float
    copied_us: float
    environment: Environment


def main(threads: Threads = 2, out: Out = RESULTS, commit: Commit = None) -> None:
    """Time both ways on every point of the grid and write a table of speed-ups."""
    torch.set_num_threads(threads)
    environment = Environment.read(torch.device("cpu"), commit)
    rows = []
    for name, (batch, tasks), m, q_len in tqdm(list(product(SHAPES, BATCHES, PREFIXES, QUERIES))):
        shape = SHAPES[name]
        call = random_call(shape, batch, tasks, m, q_len)
        host = torch_sdpa._Batch(call)
        shared, copied = alternate(
            partial(torch_sdpa._shared, call, host), partial(torch_sdpa._concatenated, call, host)
        )
        rows.append(SharingRow(name, str(shape[3]), batch, tasks, m, q_len, OWN_KEYS, shared, copied, environment))
    folder = out / environment.slug
    append(folder / "sharing.jsonl", rows)
    table = markdown(rows, environment)
    (folder / "sharing.md").write_text(table)
    print(table)


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


def markdown(rows: list[SharingRow], environment: Environment) -> str:
    """The speed-ups as a table."""
    ratios = [row.copied_us / row.shared_us for row in rows]
    lines = [
        "# Sharing a prefix against copying it, on a CPU\n",
        f"Made by `python -m benchmarks.sharing`; commit {environment.commit}, torch {environment.torch_version}, "
        f"{environment.threads} threads, {OWN_KEYS} own keys. Time of copying over time of sharing: above 1, "
        "sharing wins.",
        f"Geometric mean {statistics.geometric_mean(ratios):.2f}, worst {min(ratios):.2f}.\n",
        "| heads | rows x tasks | queries | " + " | ".join(f"m = {m}" for m in PREFIXES) + " |",
        "|---|---|--:|" + "--:|" * len(PREFIXES),
    ]
    for name, (batch, tasks), q_len in product(SHAPES, BATCHES, QUERIES):
        key = (name, batch, tasks, q_len)
        cells = [
            f"{ratio:.2f}"
            for row, ratio in zip(rows, ratios, strict=True)
            if (row.heads, row.rows, row.tasks, row.q_len) == key
        ]
        lines.append(f"| {name} | {batch} x {tasks} | {q_len} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
