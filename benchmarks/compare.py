"""One point of a benchmark: every peer's result is checked, then those that are right are timed together."""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import torch

from prefix_attn.cost import Cost
from prefix_attn.tolerance import FORWARD

from .memory import allocated_at_once
from .peers import Peer, Point, Problem
from .peers.check import OF_PEERS, Reference, uninitialised_memory_is_nan
from .record import Environment, Row
from .roofs import Roofs
from .timing import REPEATS, Runner, Timing, first_line, host_us, input_sets, measure, runner_for

#: Replicas larger than this, all input sets together, are left out.
REPLICA_LIMIT = 40 * 10**9


class DeviceLost(RuntimeError):
    """The device no longer answers: nothing after this can be measured by this process."""


@dataclass(frozen=True)
class Bench:
    """What stays the same from point to point."""

    device: torch.device
    environment: Environment
    roofs: Roofs
    peers: Sequence[Peer]
    repeats: int = REPEATS

    def rows(self, point: Point, seconds: float, seed: int) -> list[Row]:
        """One row per peer; about ``seconds`` go into the timing, on inputs drawn from ``seed``.

        Raises:
            DeviceLost: a kernel left the device unusable.
        """
        try:
            with torch.no_grad():
                return _Comparison(self, point, seed).rows(seconds)
        except RuntimeError as e:  # a kernel's error may show only here
            _check_alive(self.device, e)
            raise
        finally:
            gc.collect()  # a graph and its memory may hang in a cycle with a traceback
            if self.device.type == "cuda":
                with suppress(RuntimeError):  # said above
                    torch.cuda.empty_cache()


class _Comparison:
    """The peers at one point, on shared problems."""

    def __init__(self, bench: Bench, point: Point, seed: int) -> None:
        self.bench, self.point = bench, point
        first = Problem.random(point, bench.device, seed)
        self.cost, self.own_cost = Cost.of(first.call), Cost.of(first.without_prefix.call)
        sets = input_sets(self.own_cost.bytes, bench.device)  # the peer that touches least needs the most
        self.problems = [first, *(Problem.random(point, bench.device, seed + i) for i in range(1, sets))]
        self.references = {True: Reference.of(first), False: Reference.of(first.without_prefix)}
        self.runners: dict[str, Runner] = {}

    def rows(self, seconds: float) -> list[Row]:
        rows = [self._checked(peer) for peer in self.bench.peers]
        if not self.runners:
            return rows
        rng = random.Random(self.point.batch)
        timings = measure(self.runners, seconds, rng, self.bench.repeats)
        return [_timed(row, timings[row.provider]) if row.provider in timings else row for row in rows]

    def _checked(self, peer: Peer) -> Row:
        """The peer's row without times; a runner waits for it if its result was right."""
        cost = self.cost if peer.with_prefix else self.own_cost
        touched = cost.bytes_replicated if peer.replicates else cost.bytes
        sets = min(len(self.problems), input_sets(touched, self.bench.device))
        roofs, dtype = self.bench.roofs, self.point.dtype
        row = Row(
            provider=peer.name, version=peer.version, **asdict(self.point), status="", failed=False,
            bytes=touched, flops=cost.flops, floor_us=roofs.floor_us(cost, dtype),
            roof_bytes_per_s=roofs.bytes_per_s, roof_cache_bytes_per_s=roofs.cache_bytes_per_s,
            roof_flops_per_s=roofs.flops_per_s[dtype],
            eager_error=self.references[peer.with_prefix].eager_error, environment=self.bench.environment,
        )  # fmt: skip
        reason = peer.unavailable(self.bench.device)
        if reason is not None:
            return replace(row, status=f"unavailable: {reason}")
        if (reason := peer.unsuited(self.point)) is not None:
            return replace(row, status=f"skipped: {reason}")
        if peer.replicates and sets * touched > self._replica_limit():
            return replace(row, status=f"skipped: {sets} replicas of {touched / 1e9:.1f} GB")
        try:
            return self._run(peer, row, sets)
        except torch.OutOfMemoryError:
            return replace(row, status="skipped: out of memory", failed=peer.ours)
        except Exception as e:  # whatever a peer raises is its answer to this point
            _check_alive(self.bench.device, e)
            return replace(row, status=f"refused: {type(e).__name__}: {first_line(e)}", failed=peer.ours)

    def _run(self, peer: Peer, row: Row, sets: int) -> Row:
        device, reference = self.bench.device, self.references[peer.with_prefix]
        first, factor = self.problems[0], FORWARD if peer.ours else OF_PEERS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA explains a refusal in warnings; its error says that it refused
            calls = [peer.prepare(problem) for problem in self.problems[:sets]]
            if peer.ours:
                with uninitialised_memory_is_nan():
                    out = calls[0]()
            else:
                out = calls[0]()
            error, wrong = reference.check(peer.in_batch_order(out, first), first, factor)
            row = replace(row, error=error, plan_us=peer.plan_us, compile_s=peer.compile_s)
            if wrong is not None:
                return replace(row, status=f"wrong: {wrong}", failed=True)
            runner, note = runner_for(calls, device)
            for x in runner.outs:
                x.fill_(float("nan"))
            runner.seconds(1)
            error, wrong = reference.check(peer.in_batch_order(runner.outs[0], first), first, factor)
            if wrong is None and not all(bool(x.isfinite().all()) for x in runner.outs):
                wrong = "elements are NaN, infinite or were never written"
            if wrong is not None:
                return replace(row, error=error, status=f"wrong when repeated: {wrong}", failed=True)
            read = self.cost.bytes if peer.makes_replica else row.bytes  # the replica, like the result, is allocated
            inputs = read - out.numel() * out.element_size()
            peak = inputs + allocated_at_once(calls[0], device)
            host = host_us(calls, device) if device.type == "cuda" else None  # a CPU is its own host
        self.runners[peer.name] = runner
        return replace(row, status=f"ok, {note}" if note else "ok", sets=sets, host_us=host, peak_bytes=peak)

    def _replica_limit(self) -> int:
        if self.bench.device.type == "cuda":
            return min(REPLICA_LIMIT, torch.cuda.get_device_properties(self.bench.device).total_memory // 3)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min(REPLICA_LIMIT, memory // 12)  # several peers hold one at a time


def _timed(row: Row, timing: Timing) -> Row:
    us = timing.median_us
    return replace(
        row, median_us=us, p20_us=timing.p20_us, p80_us=timing.p80_us, calls=timing.calls, repeats=timing.repeats,
        fraction_of_floor=row.floor_us / us, gb_per_s=1e-3 * row.bytes / us, tflop_per_s=1e-6 * row.flops / us,
    )  # fmt: skip


def _check_alive(device: torch.device, cause: Exception) -> None:
    """Raise `DeviceLost` if the device does not answer any more."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as e:
        raise DeviceLost(f"after {type(cause).__name__}: {first_line(cause)}") from e
