"""What one decode call costs the host before the device has anything to do, part by part.

    python -m benchmarks.launch

    total = checks of shapes and dtypes + choice of backend and regime + PyTorch's operator + launcher

beside a plain launch: Triton called with one of the kernels and arguments that are ready. Without a GPU all of it but
the driver's own part, the last call of each launch, is done and timed (pretended_gpu.py), and the row says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich import print

from . import record
from .options import RESULTS, Commit, Out
from .peers.problem import Point, Problem
from .pretended_gpu import pretend
from .timing import HOST_CALLS, host_us


@dataclass(frozen=True)
class LaunchRow:
    """Microseconds of host time a call, each the fastest of many repeats, as `timing.host_us` takes it."""

    point: Point
    status: str
    total_us: float
    checks_us: float
    dispatch_us: float
    operator_us: float
    launcher_us: float
    plain_launch_us: float
    environment: record.Environment


class Recorder:
    """Stands for a kernel: remembers its last launch, and launches nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            self.grid, self.arguments = grid, arguments

        return launch


@torch.no_grad()
def measure(device: torch.device, repeats: int, environment: record.Environment) -> LaunchRow:
    """Time a call of inline decode, 64 rows over 8 tasks."""
    import prefix_attn as pa
    from prefix_attn import dispatch, ops
    from prefix_attn.backends import triton as backend
    from prefix_attn.checks import checked_call
    from prefix_attn.kernels import decode

    on_gpu = device.type == "cuda"
    point = Point("decode", batch=64, tasks=8, m=128, n=512)
    problem = Problem.random(point, device, seed=0)
    arguments: tuple[Any, ...] = (problem.q, problem.k, problem.v, problem.prefix, problem.task_ids)
    recorder = Recorder()
    kernel = decode.decode_kernel

    def parts() -> dict[str, float]:
        call = checked_call(*arguments)
        regime = dispatch.choose(call, "triton").regime
        assert regime is not None
        assert regime.name == "inline"
        timed: dict[str, Callable[[], Any]] = {
            "total": lambda: pa.prefix_attention(*arguments, backend="triton"),
            "checks": lambda: checked_call(*arguments),
            "chosen": lambda: dispatch.choose_again(checked_call(*arguments), "triton"),
            "attention": lambda: ops.attention(call, "triton"),
            "again": lambda: dispatch.choose_again(call, "triton"),
            "launcher": lambda: backend.forward(call),
        }
        return {name: host_us([function] * HOST_CALLS, device, repeats) for name, function in timed.items()}

    with ExitStack() as stack:
        if not on_gpu:
            stack.enter_context(patch.object(ops, "check_values", lambda call, rows: None))  # read on a CPU alone
        us = parts()
    with patch.object(decode, "decode_kernel", recorder):
        backend.forward(checked_call(*arguments))
    plain = host_us([lambda: kernel[recorder.grid](**recorder.arguments)] * HOST_CALLS, device, repeats)
    return LaunchRow(
        point, "ok" if on_gpu else "ok: no GPU, without the driver's own part of a launch, values not checked",
        total_us=us["total"], checks_us=us["checks"], dispatch_us=us["chosen"] - us["checks"],
        operator_us=us["attention"] - us["again"] - us["launcher"], launcher_us=us["launcher"], plain_launch_us=plain,
        environment=environment,
    )  # fmt: skip


def main(
    repeats: Annotated[int, typer.Option(min=1, help="of 20 calls each, of which the fastest counts")] = 200,
    out: Out = RESULTS,
    commit: Commit = None,
) -> None:
    """Time the host's part of one decode call, print it, and append a JSON line to <out>/<device>/launch.jsonl."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            raise typer.BadParameter("TRITON_INTERPRET=1: kernels are interpreted, not launched; unset it")
        pretend()
        torch.set_num_threads(1)
    environment = record.Environment.read(device, commit)
    row = measure(device, repeats, environment)
    print(f"{row.point} on {environment.device}: {row.status}")
    print(
        f"total {row.total_us:.1f} us = checks {row.checks_us:.1f} + dispatch {row.dispatch_us:.1f} + "
        f"operator {row.operator_us:.1f} + launcher {row.launcher_us:.1f}; a plain launch: {row.plain_launch_us:.1f} us"
    )
    path = out / environment.slug / "launch.jsonl"
    record.append(path, [row])
    print(f"appended to {path}")


if __name__ == "__main__":
    typer.run(main)
