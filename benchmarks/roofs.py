"""What the device sustains, measured on random data before anything is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefix_attn.cost import Cost, Roof

from .timing import REPEATS, Calls, Timing, runner_for

COPY_BYTES = 8 * 10**9
MATMUL_SIZE = 8192
LAUNCHES = 256


@dataclass(frozen=True)
class Roofs:
    """Bytes/s of a large copy (read and written), FLOP/s of a large matrix product, microseconds of an empty launch.

    The launch is one of many that wait for each other in one CUDA graph, which is how the calls are timed.
    """

    bytes_per_s: float
    flops_per_s: float
    launch_us: float

    def floor_us(self, cost: Cost) -> float:
        """Microseconds below which nothing that does this work can run."""
        return max(cost.floor_us(Roof(self.bytes_per_s, self.flops_per_s)), self.launch_us)


def measure_roofs(
    device: torch.device, copy_bytes: int = COPY_BYTES, matmul_size: int = MATMUL_SIZE, launches: int = LAUNCHES
) -> Roofs:
    """Medians; the copy takes at most a quarter of the free memory."""
    if device.type == "cuda":
        copy_bytes = min(copy_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    copy_s = _copy_seconds(device, copy_bytes // 4)
    product_s = _product_seconds(device, matmul_size)
    one = torch.zeros(1, device=device)
    launch_s = _median_seconds([lambda: one.add_(1.0)] * launches, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Roofs(copy_bytes // 4 * 4 / copy_s, 2 * matmul_size**3 / product_s, 1e6 * launch_s)


def _copy_seconds(device: torch.device, elements: int) -> float:
    """A copy that reads and writes ``elements`` of two bytes each."""
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return _median_seconds([lambda: target.copy_(source)], device)


def _product_seconds(device: torch.device, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> Tensor:
        return torch.mm(a, b, out=out)

    return _median_seconds([product], device)


def _median_seconds(calls: Calls, device: torch.device) -> float:
    runner, _ = runner_for(calls, device)
    runner.seconds(3)
    samples = [runner.seconds(5) / (5 * runner.calls) for _ in range(REPEATS)]
    return 1e-6 * Timing.of(samples, 5 * runner.calls).median_us
