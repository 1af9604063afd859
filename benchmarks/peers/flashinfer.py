"""FlashInfer on pages that rows of a task share: its cascade, and its plain batch decode with repeated page ids.

Its kernels are compiled when first used, for minutes. So that no measurement waits for that, a combination of
backend, dtype and head dimension is left out until this has compiled it (it needs nvcc and ninja):

    python -m benchmarks.peers.flashinfer

Written for 0.6.8.post1. Rows are sorted by task and plans are made once per batch, both untimed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .by_task import Sorted, SortedRows
from .interface import Peer, elapsed_us
from .paging import PAGE, Pages, page_ids
from .problem import Point, Problem

#: Bytes of scratch memory for split rows; more than the 128 MB of its examples, for 256 rows of 32 heads.
WORKSPACE = 512 * 2**20

#: What to compile, the most used first: (backend, dtype, head_dim). "auto" is "fa3" on an H200, which takes minutes.
COMBINATIONS = [
    ("fa2", "bfloat16", 128), ("auto", "bfloat16", 128), ("fa2", "bfloat16", 64), ("fa2", "bfloat16", 256),
    ("fa2", "float16", 128),
]  # fmt: skip


class FlashInfer(Peer):
    """What both ways have in common: which kernels exist, and a plan for all input sets of a point."""

    backend: str

    def __init__(self) -> None:
        try:
            self.version = f"flashinfer {version('flashinfer-python')}"
        except PackageNotFoundError:
            self.version = "flashinfer"
        self.compiling = False
        self.latest: tuple[object, Any] | None = None

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it runs on GPUs only, not on {device.type!r}"
        try:
            import_module("flashinfer")
        except Exception as e:  # it looks for compilers and a home when it is imported
            return f"flashinfer cannot be imported ({type(e).__name__}: {str(e).partition(chr(10))[0]})"
        return None

    def unsuited(self, point: Point) -> str | None:
        if point.q_len > 1:
            return "only its decode is compared"
        if self.compiling or marker(self.backend, point.dtype, point.head_dim).exists():
            return None
        return (
            f"its {self.backend} kernels for {point.dtype}, head_dim {point.head_dim} are not compiled yet; "
            "python -m benchmarks.peers.flashinfer does it"
        )

    def planned(self, problem: Problem, make: Callable[[], Any], plan: Callable[[Any], None]) -> Any:
        """A planned wrapper, for this problem or an earlier one of the same sizes; the plan's time is noted."""
        key = problem.point, tuple(problem.task_ids.tolist()), tuple(problem.prefix.spans)
        if self.latest is None or self.latest[0] != key:
            self.latest = None  # its memory goes first
            wrapper = make()
            plan(wrapper)  # loads its kernels
            self.plan_us = elapsed_us(lambda: plan(wrapper), problem.q.device)
            self.latest = key, wrapper
        return self.latest[1]


class FlashInferCascade(SortedRows, FlashInfer):
    """``MultiLevelCascadeAttentionWrapper``: a pass over the prefixes, a pass over own keys, a merge."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.name = f"flashinfer cascade, {backend}"

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        flashinfer, point, by_task = import_module("flashinfer"), problem.point, Sorted.of(problem)
        pages, order = Pages.of(problem, full_pages_only=False), by_task.order.tolist()
        levels = [tables([page_ids(x) for x in places], [tokens for _, tokens in places])
                  for places in (pages.shared, [pages.own[b] for b in order])]  # fmt: skip
        queries = [integers([0, *accumulate(by_task.rows)]), integers(list(range(point.batch + 1)))]

        def make() -> Any:
            wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace(problem.q.device), "NHD")
            if self.backend != "auto":  # the class chooses by itself, and does not ask
                for level in wrapper._batch_prefill_wrappers:
                    level._backend = self.backend
            return wrapper

        def plan(wrapper: Any) -> None:
            wrapper.plan(
                queries, *(list(x) for x in zip(*levels, strict=True)), point.q_heads, point.kv_heads, point.head_dim,
                PAGE, causal=False, q_data_type=problem.q.dtype,
            )  # fmt: skip

        wrapper = self.planned(problem, make, plan)
        q = problem.q[by_task.order, :, 0].contiguous()  # [B, H, D]

        def call() -> Tensor:
            out: Tensor = wrapper.run(q, (pages.k, pages.v))
            return out

        return call


class FlashInferPlain(FlashInfer):
    """``BatchDecodeWithPagedKVCacheWrapper``, tensor cores on: rows of a task list the same pages."""

    name = "flashinfer decode, shared pages"
    backend = "fa2"

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        flashinfer, point = import_module("flashinfer"), problem.point
        pages = Pages.of(problem, full_pages_only=True)
        begins, ids, last = tables(*pages.row_tables(problem.task_ids.tolist()))

        def make() -> Any:
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace(problem.q.device), "NHD", use_tensor_cores=True, backend=self.backend
            )

        def plan(wrapper: Any) -> None:
            wrapper.plan(
                begins, ids, last, point.q_heads, point.kv_heads, point.head_dim, PAGE, q_data_type=problem.q.dtype
            )

        wrapper = self.planned(problem, make, plan)
        q = problem.q[:, :, 0].contiguous()  # [B, H, D]

        def call() -> Tensor:
            out: Tensor = wrapper.run(q, (pages.k, pages.v))
            return out

        return call


def tables(pages: list[list[int]], tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's page table: where each list of pages begins, all lists, and the tokens of each last page."""
    if min(tokens) < 1:
        raise ValueError("it takes no sequence without keys")
    begins = [0, *accumulate(map(len, pages))]
    return (
        integers(begins),
        integers([p for some in pages for p in some]),
        integers([(n - 1) % PAGE + 1 for n in tokens]),
    )


def integers(x: list[int]) -> Tensor:
    """On the host, where its plan reads them; it copies to the device what its kernels need."""
    return torch.tensor(x, dtype=torch.int32)


@cache
def workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def marker(backend: str, dtype: str, head_dim: int) -> Path:
    """A file in FlashInfer's cache of compiled kernels that says that these are among them."""
    folder: Path = import_module("flashinfer.jit.env").FLASHINFER_WORKSPACE_DIR
    return Path(folder) / f"prefix-attn-{backend}-{dtype}-{head_dim}"


def compile_kernels() -> int:
    """Run each combination once on a tiny problem, which compiles it, and leave its marker; the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = FlashInferPlain().unavailable(device)
    if reason is not None:
        print(f"flashinfer: {reason}", flush=True)
        return 2
    failed = 0
    for backend, dtype, head_dim in COMBINATIONS:
        if marker(backend, dtype, head_dim).exists():
            continue
        point, start = Point("decode", 2, 1, 32, 32, 4, 2, head_dim, dtype), time.perf_counter()
        peers = [FlashInferCascade(backend), *([FlashInferPlain()] if backend == FlashInferPlain.backend else [])]
        try:
            for peer in peers:
                peer.compiling = True
                peer.prepare(Problem.random(point, device, seed=0))()
                torch.cuda.synchronize(device)
            marker(backend, dtype, head_dim).touch()
            said = f"compiled in {time.perf_counter() - start:.0f} s"
        except Exception as e:  # whatever stops one combination, the others may do
            said, failed = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}", 1
        print(f"flashinfer {backend}, {dtype}, head_dim {head_dim}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(compile_kernels())
