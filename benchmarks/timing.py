"""Time calls on rotating inputs: one CUDA graph of all calls, replayed; medians over shuffled repeats.

Each call of a runner has inputs of its own, so that a replay finds none of them in the cache. Providers are timed in
turn, in a new order at each repeat: a drift of the clock meets all of them alike.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

Calls = Sequence[Callable[[], Tensor]]

#: Bytes after which a rotation has left a GPU's caches behind, and how many input sets it may take.
ROTATION_BYTES, MAX_SETS = 240_000_000, 64

REPEATS, MIN_REPEATS = 7, 3
MIN_REPLAYS, MIN_SECONDS = 5, 0.050

#: Calls issued together: so few that some passes run undisturbed, and that the device's queue never fills.
HOST_CALLS, HOST_PASSES = 20, 10


def input_sets(touched_bytes: int, device: torch.device) -> int:
    """How many input sets a call that touches so many bytes is rotated through, so that none is found in a cache."""
    rotation, least = (ROTATION_BYTES, 2) if device.type == "cuda" else (2 * cpu_cache_bytes(), 1)
    return min(MAX_SETS, max(least, math.ceil(rotation / max(1, touched_bytes))))


@lru_cache
def cpu_cache_bytes() -> int:
    """The largest cache of a core, as Linux tells it; 64 MiB, which is large, where it does not."""
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((1024 * int(file.read_text().strip().removesuffix("K")) for file in found), default=64 * 2**20)


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over ``repeats``; ``calls`` were timed together for each of them."""

    median_us: float
    p20_us: float
    p80_us: float
    calls: int
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int) -> Timing:
        """From seconds per call, one for each repeat."""
        us = [1e6 * s for s in seconds]
        fifths = statistics.quantiles(us, n=5, method="inclusive") if len(us) > 1 else us * 4
        return cls(statistics.median(us), fifths[0], fifths[3], calls, len(us))


class Runner(Protocol):
    """Something that makes ``calls`` calls at each replay; ``outs`` are the results of the latest one."""

    calls: int
    outs: list[Tensor]

    def seconds(self, replays: int) -> float:
        """Run that many replays and wait for them: the seconds they took."""


class GraphRunner:
    """All calls captured in one CUDA graph: what is timed is the device, not the host.

    The calls are kept: a graph remembers the addresses of what they read, and not that it must stay there.
    """

    def __init__(self, calls: Calls) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # handles, workspaces and compiled kernels must exist before the capture
            calls[0]()
        torch.cuda.synchronize()
        self.call_list, self.calls = calls, len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.outs = [call() for call in calls]
        torch.cuda.synchronize()

    def seconds(self, replays: int) -> float:
        def run() -> None:
            for _ in range(replays):
                self.graph.replay()

        return _event_seconds(run)


class LoopRunner:
    """Calls issued one by one, timed by the host's clock; on a GPU by two events, with whatever the host is late."""

    def __init__(self, calls: Calls, device: torch.device) -> None:
        self.call_list, self.calls, self.on_gpu = calls, len(calls), device.type == "cuda"
        self.outs: list[Tensor] = []

    def seconds(self, replays: int) -> float:
        def run() -> None:
            for _ in range(replays):
                self.outs = [call() for call in self.call_list]

        return _event_seconds(run) if self.on_gpu else _host_seconds(run)


def runner_for(calls: Calls, device: torch.device) -> tuple[Runner, str]:
    """A runner, and a word on how it times: empty for the usual way of the device."""
    if device.type != "cuda":
        return LoopRunner(calls, device), ""
    try:
        return GraphRunner(calls), ""
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError):
            raise
        torch.cuda.synchronize()
        return LoopRunner(calls, device), f"timed with events, not a graph: {first_line(e)}"


def host_us(calls: Calls, device: torch.device, passes: int = HOST_PASSES) -> float:
    """Microseconds of host time to issue one call, the device not waited for: in the fastest pass, since what delays
    the others is not the call's."""
    some = calls[:HOST_CALLS]
    samples = []
    for _ in range(passes):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for call in some:
            call()
        samples.append(1e6 * (time.perf_counter() - start) / len(some))
    return min(samples)


def measure(
    runners: Mapping[str, Runner], seconds: float, rng: random.Random, repeats: int = REPEATS
) -> dict[str, Timing]:
    """Time all runners against each other within about ``seconds``.

    Each repeat replays a runner at least 5 times and 50 ms, or as often as its share of the time allows. Where even one
    replay each is too much, there are fewer repeats, but at least `MIN_REPEATS`.
    """
    deadline = time.monotonic() + seconds
    replays = {}
    for name, runner in runners.items():
        once = runner.seconds(1)
        once = max(runner.seconds(1) if once < MIN_SECONDS else once, 1e-7)
        wanted = max(MIN_REPLAYS, math.ceil(MIN_SECONDS / once))
        affordable = int(seconds / (repeats * len(runners) * once))
        replays[name] = max(1, min(wanted, affordable))
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for repeat in range(repeats):
        if repeat >= MIN_REPEATS and time.monotonic() > deadline:
            break
        for name in rng.sample(list(runners), len(runners)):
            calls = replays[name] * runners[name].calls
            samples[name].append(runners[name].seconds(replays[name]) / calls)
    return {name: Timing.of(samples[name], replays[name] * runners[name].calls) for name in runners}


def first_line(e: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def _host_seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _event_seconds(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))
