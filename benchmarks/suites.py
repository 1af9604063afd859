"""Every grid of the benchmarks: which points each suite measures, on a CPU and on a GPU, in full and in a hurry.

Points stand in the order of their worth: what a budget cuts off is the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .peers.problem import Point

#: Query heads, kv heads, head dim.
Heads = tuple[int, int, int]
LLAMA_3, LLAMA_2, GPT_2, GEMMA_2 = (32, 8, 128), (32, 32, 128), (12, 12, 64), (16, 8, 256)

SUITES = ("decode", "prefill", "mixed", "generate")


@dataclass(frozen=True)
class Generation:
    """One end-to-end run: ``rows`` prompts over ``tasks`` tasks.

    Attributes:
        model: a shape in `generate.MODELS`, with random weights.
        prefix_tokens: of each task's prefix; ``prompt_tokens`` and ``new_tokens`` of each row follow.
        cache: "dynamic", or "static", which transformers compiles on a GPU.
    """

    model: str
    rows: int
    tasks: int
    prefix_tokens: int
    prompt_tokens: int = 16
    new_tokens: int = 9
    cache: str = "dynamic"

    def __str__(self) -> str:
        sizes = f"{self.model} B={self.rows} T={self.tasks} m={self.prefix_tokens}"
        return sizes if self.cache == "dynamic" else f"{sizes}, {self.cache} cache"


def attention_points(suite: str, on_gpu: bool, quick: bool) -> list[Point]:
    """The points of "decode", "prefill" or "mixed"."""
    if quick:
        points = {"decode": _quick_decode, "prefill": _quick_prefill, "mixed": _quick_mixed}[suite](on_gpu)
    elif on_gpu:
        points = {"decode": _gpu_decode, "prefill": _gpu_prefill, "mixed": _gpu_mixed}[suite]()
    else:
        points = {"decode": _cpu_decode, "prefill": _cpu_prefill, "mixed": _cpu_mixed}[suite]()
    return list(dict.fromkeys(points))


def generations(on_gpu: bool, quick: bool) -> list[Generation]:
    """The points of "generate". Memory is read as a function of the batch (rows) and of the number of tasks."""
    if on_gpu:
        if quick:
            return [Generation("Llama-3-8B", 16, 4, 128, new_tokens=17)]
        batches = [Generation("Llama-3-8B", rows, 4, m, 64, 32) for m in (128, 1024, 4096) for rows in (16, 64)]
        static = [Generation("Llama-3-8B", rows, 4, m, 64, 32, cache="static") for rows, m in ((64, 1024), (16, 128))]
        tasks = [Generation("Llama-3-8B", 16, tasks, 1024, 64, 32) for tasks in (1, 8)]
        return [*batches[:1], *static, *batches[1:], *tasks]
    if quick:
        return [Generation("GPT-2", 8, 4, 100, prompt_tokens=8, new_tokens=4)]
    main = [Generation("GPT-2", 32, 8, m) for m in (20, 100, 1024)]
    batches = [Generation("GPT-2", rows, 4, 100, new_tokens=5) for rows in (4, 8, 16)]
    tasks = [Generation("GPT-2", 16, tasks, 100, new_tokens=5) for tasks in (1, 8)]
    return [*main, *batches, *tasks]


def _points(op: str, heads: Heads, dtype: str, batches: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]],
            skew: str = "even", ragged: bool = False) -> list[Point]:  # fmt: skip
    """All pairs of (batch, tasks) and (m, n)."""
    return [Point(op, b, t, m, n, *heads, dtype, skew, ragged) for b, t in batches for m, n in sizes]


CPU_KINDS = [(heads, dtype) for heads in (GPT_2, LLAMA_3) for dtype in ("float32", "bfloat16")]


def _cpu_decode() -> list[Point]:
    """Tasks of 1, 4, 8, 16 and 64 rows at the heads and dtypes of `CPU_KINDS`."""
    found: list[Point] = []
    for heads, dtype in CPU_KINDS:
        few = ((1, 1), (4, 1), (4, 4), (16, 1), (16, 4), (16, 16))
        found += _points("decode", heads, dtype, few, ((20, 64), (128, 64), (1024, 64)))
        found += _points("decode", heads, dtype, ((64, 1), (64, 8)), ((20, 64), (128, 64)))
        found += _points("decode", heads, dtype, ((16, 4),), ((128, 512), (1024, 512)))
    for heads, dtype in CPU_KINDS:
        found += _points("decode", heads, dtype, ((64, 8),), ((1024, 64),))
        found += _points("decode", heads, dtype, ((4, 1), (16, 1)), ((4096, 64),))
    return found


def _cpu_prefill() -> list[Point]:
    sizes = ((20, 64), (128, 64), (1024, 64), (128, 256))
    return [p for kind in CPU_KINDS[::3] for p in _points("prefill", *kind, ((4, 1), (4, 4), (8, 2)), sizes)]


def _cpu_mixed() -> list[Point]:
    return [p for kind in CPU_KINDS[::3] for m in (128, 512) for p in _mixes(*kind, 32, m)]


def _mixes(heads: Heads, dtype: str, batch: int, m: int) -> list[Point]:
    """One batch: from one task to as many as rows, then a quarter as many, dealt in other ways, and of many lengths."""
    sizes, some = [(m, 64)], batch // 4
    tasks = [2**i for i in range(batch.bit_length()) if 2**i <= batch]
    found = _points("decode", heads, dtype, [(batch, t) for t in tasks], sizes)
    for skew in ("zipf", "one big"):
        found += _points("decode", heads, dtype, [(batch, some)], sizes, skew)
    return found + _points("decode", heads, dtype, [(batch, some)], sizes, "zipf", ragged=True)


def _quick_decode(on_gpu: bool) -> list[Point]:
    if on_gpu:
        return _points("decode", LLAMA_3, "bfloat16", ((16, 1), (64, 8)), ((32, 64), (128, 64), (1024, 64)))
    small = _points("decode", GPT_2, "float32", ((1, 1), (16, 1), (16, 4)), ((20, 64), (128, 64), (1024, 64)))
    return [*small, *_points("decode", LLAMA_3, "bfloat16", ((16, 1),), ((128, 64), (1024, 64)))]


def _quick_prefill(on_gpu: bool) -> list[Point]:
    if on_gpu:
        return _points("prefill", LLAMA_3, "bfloat16", ((16, 4),), ((128, 512), (1024, 512)))
    return _points("prefill", GPT_2, "float32", ((4, 1),), ((20, 64), (1024, 64)))


def _quick_mixed(on_gpu: bool) -> list[Point]:
    heads, dtype, batch = (LLAMA_3, "bfloat16", 64) if on_gpu else (GPT_2, "float32", 16)
    some = [(batch, 1), (batch, 4), (batch, batch)]
    even = _points("decode", heads, dtype, some, ((128, 64),))
    return [*even, *_points("decode", heads, dtype, [(batch, 4)], ((128, 64),), "zipf")]


def _gpu_decode() -> list[Point]:
    batches = ((16, 1), (64, 8), (1, 1), (16, 8), (256, 8), (64, 1), (256, 1), (64, 64))
    sizes = ((1024, 64), (128, 64), (32, 64), (8192, 64), (1024, 512), (128, 512), (32, 512), (8192, 512))
    found = [p for size in sizes for p in _points("decode", LLAMA_3, "bfloat16", batches, (size,))]
    for heads in (LLAMA_2, GPT_2, GEMMA_2):
        found += _points("decode", heads, "bfloat16", ((16, 1), (64, 8)), ((32, 64), (128, 64), (1024, 64)))
    found += _points("decode", LLAMA_3, "bfloat16", ((16, 8), (64, 8)), ((128, 64), (1024, 64)), ragged=True)
    found += _points("decode", LLAMA_3, "float16", ((16, 1), (64, 8)), ((128, 64), (1024, 64)))
    found += _points("decode", LLAMA_3, "bfloat16", batches, ((128, 4096),))
    return found + _points("decode", LLAMA_3, "bfloat16", ((16, 1), (64, 1)), ((32768, 64),))


def _gpu_prefill() -> list[Point]:
    sizes = [(m, n) for n in (64, 512, 2048) for m in (32, 128, 1024, 8192)]
    long = _points("prefill", LLAMA_3, "bfloat16", ((4, 1),), [(m, n) for n in (4096, 8192) for m in (128, 1024)])
    return [*long, *_points("prefill", LLAMA_3, "bfloat16", ((16, 4),), sizes)]


def _gpu_mixed() -> list[Point]:
    return [p for m in (128, 1024) for p in _mixes(LLAMA_3, "bfloat16", 64, m)]
