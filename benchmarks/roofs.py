"""What the device sustains, measured on random data before anything is compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefix_attn.cost import Cost, Roof

from .timing import REPEATS, Calls, runner_for


@dataclass(frozen=True)
class Sizes:
    """What is copied and multiplied to find the roofs: much more than the caches hold, and much less."""

    copy_bytes: int
    cached_bytes: int
    matmul: int
    launches: int = 256


GPU = Sizes(copy_bytes=8 * 10**9, cached_bytes=16 * 2**20, matmul=8192)
CPU = Sizes(copy_bytes=5 * 10**8, cached_bytes=2**19, matmul=1536)


@dataclass(frozen=True)
class Roofs:
    """What calls are held against, each the best of several repeats: what disturbs one is no limit of the device.

    Attributes:
        bytes_per_s: of a large copy, bytes read and written.
        cache_bytes_per_s: the same of a copy that stays in the L2 cache.
        flops_per_s: of a large matrix product, by dtype.
        launch_us: an empty call; one of many that wait for each other in a CUDA graph, as the calls timed are.
    """

    bytes_per_s: float
    cache_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    launch_us: float

    def floor_us(self, cost: Cost, dtype: str) -> float:
        """Microseconds below which nothing that does this work, its keys not in a cache, can run."""
        return max(cost.floor_us(Roof(self.bytes_per_s, self.flops_per_s[dtype])), self.launch_us)

    @property
    def warning(self) -> str | None:
        """`busy` of these."""
        return busy(self.bytes_per_s, self.cache_bytes_per_s)

    def __str__(self) -> str:
        products = ", ".join(f"{1e-12 * rate:.3g} TFLOP/s in {dtype}" for dtype, rate in self.flops_per_s.items())
        return (
            f"measured: {1e-9 * self.bytes_per_s:.3g} GB/s copied, {1e-9 * self.cache_bytes_per_s:.3g} GB/s within the "
            f"cache, {products}, {self.launch_us:.2f} us a call"
        )


def busy(bytes_per_s: float, cache_bytes_per_s: float) -> str | None:
    """That rates were measured while the machine did something else, if they say so themselves: no cache is slower."""
    if cache_bytes_per_s >= bytes_per_s:
        return None
    return (
        f"the machine is busy: {1e-9 * cache_bytes_per_s:.3g} GB/s within the cache, {1e-9 * bytes_per_s:.3g} GB/s "
        "outside of it; measure again when it is quiet"
    )


def measure_roofs(device: torch.device, dtypes: tuple[str, ...], sizes: Sizes | None = None) -> Roofs:
    """Measure them; the copy takes at most a quarter of a GPU's free memory."""
    on_gpu = device.type == "cuda"
    sizes = sizes or (GPU if on_gpu else CPU)
    if on_gpu:
        sizes = replace(sizes, copy_bytes=min(sizes.copy_bytes, torch.cuda.mem_get_info(device)[0] // 4))
        products = {dtype: max(1024, sizes.matmul // (2 if dtype == "float32" else 1)) for dtype in dtypes}
    else:
        products = dict.fromkeys(dtypes, sizes.matmul)
    one = torch.zeros(1, device=device)
    launch_s = _best_seconds([lambda: one.add_(1.0)] * sizes.launches, device)
    roofs = Roofs(
        bytes_per_s=sizes.copy_bytes / _copy_seconds(device, sizes.copy_bytes),
        cache_bytes_per_s=sizes.cached_bytes / _copy_seconds(device, sizes.cached_bytes, times=32),
        flops_per_s={dtype: 2 * size**3 / _product_seconds(device, size, dtype) for dtype, size in products.items()},
        launch_us=1e6 * launch_s,
    )
    if on_gpu:
        torch.cuda.empty_cache()
    return roofs


def _copy_seconds(device: torch.device, size: int, times: int = 1) -> float:
    """A copy that reads half of ``size`` bytes and writes the other half; one of so many in a row.

    On a GPU it changes signs on the way: a graph gives plain copies to the copy engines, which are slower than kernels
    (2.7 against 4.3 TB/s on an H200).
    """
    source = torch.randn(max(1, size // 8), device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return torch.neg(source, out=target) if device.type == "cuda" else target.copy_(source)

    return _best_seconds([copy] * times, device)


def _product_seconds(device: torch.device, size: int, dtype: str) -> float:
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> Tensor:
        return torch.mm(a, b, out=out)

    return _best_seconds([product], device)


def _best_seconds(calls: Calls, device: torch.device) -> float:
    """Seconds of one call, in the best of the repeats."""
    runner, _ = runner_for(calls, device)
    warm, replays = (3, 5) if device.type == "cuda" else (1, 1)
    runner.seconds(warm)
    return min(runner.seconds(replays) for _ in range(REPEATS)) / (replays * runner.calls)
