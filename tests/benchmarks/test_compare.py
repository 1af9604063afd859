"""The comparison on the CPU, at sizes that take no time: what is right is timed, what is wrong never is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import record, roofs, summary, tables
from benchmarks.compare import Bench, _Comparison
from benchmarks.memory import allocated_at_once
from benchmarks.peers import (
    NO_PREFIX,
    OURS,
    Ours,
    OwnKeysOnly,
    Peer,
    Point,
    Problem,
    SdpaConcatenated,
    SdpaReplica,
    cpu_peers,
)
from benchmarks.peers.check import Reference, uninitialised_memory_is_nan
from benchmarks.record import Environment
from benchmarks.roofs import Roofs, Sizes, measure_roofs
from benchmarks.run import Outcome
from prefix_attn.backends import torch_sdpa
from prefix_attn.cost import Cost

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
DECODE = Point("decode", 5, 2, 32, 7, **SIZES)
PREFILL = Point("prefill", 3, 2, 16, 6, **SIZES)
OP = pytest.mark.parametrize("point", [DECODE, PREFILL], ids=lambda p: p.op)

PEERS: list[Peer] = [
    *cpu_peers(),
    *(SdpaReplica(b) for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION)),
]
MIXED = Point("decode", 9, 3, 32, 7, **SIZES, skew="zipf")
RAGGED = Point("decode", 9, 3, 32, 7, **SIZES, skew="one big", ragged=True)


@pytest.fixture
def bench() -> Bench:
    rates = Roofs(1e9, 1e10, {"float32": 1e9, "bfloat16": 2e9}, launch_us=1.0)
    environment = replace(Environment.read(CPU, commit="abc"), device="Test GPU 9000")
    return Bench(CPU, environment, rates, PEERS, repeats=3)


@pytest.fixture(autouse=True)
def few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.MAX_SETS", 3)
    monkeypatch.setattr("benchmarks.timing.cpu_cache_bytes", lambda: 10**9)
    monkeypatch.setattr("benchmarks.timing.MIN_SECONDS", 1e-4)


@pytest.mark.parametrize("point", [DECODE, PREFILL, MIXED, RAGGED], ids=str)
@pytest.mark.parametrize("peer", [p for p in PEERS if p.unavailable(CPU) is None], ids=lambda p: p.name)
def test_every_peer_computes_the_same(point: Point, peer: Peer) -> None:
    problem = Problem.random(point, CPU, seed=1)
    right = problem if peer.with_prefix else problem.without_prefix
    with torch.no_grad():
        out = peer.in_batch_order(peer.prepare(problem)(), problem)
        error, wrong = Reference.of(right).check(out, problem)
    assert wrong is None
    assert error is not None
    assert error < 1e-5


def test_how_rows_are_dealt_to_tasks() -> None:
    assert sorted(MIXED.task_ids) == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(RAGGED.task_ids) == [0] * 7 + [1, 2]
    assert RAGGED.lens == [8, 20, 32]
    assert replace(RAGGED, tasks=1, skew="even").lens == [32]
    assert DECODE.task_ids == [0, 1, 0, 1, 0]
    assert str(RAGGED) == "decode B=9 T=3 m=32 n=7 4/2/16/float32 one big ragged"


def test_a_step_puts_the_newest_keys_into_the_cache() -> None:
    problem = Problem.random(DECODE, CPU, seed=1)
    k, v = (x.clone() for x in problem.replica)
    append = problem.append_newest(k, v)
    k[:, :, -1], v[:, :, -1] = 0, 0
    append()
    assert torch.equal(k, problem.replica[0])
    assert torch.equal(v, problem.replica[1])


@OP
def test_our_kernels_in_the_interpreter(point: Point) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are not interpreted where there is a GPU")
    problem = Problem.random(replace(point, dtype="bfloat16"), CPU, seed=2)
    for peer, right in ((Ours(), problem), (OwnKeysOnly(), problem.without_prefix)):
        with torch.no_grad(), uninitialised_memory_is_nan():
            out = peer.prepare(problem)()
        assert Reference.of(right).check(out, problem)[1] is None


@OP
def test_rows_of_a_point(point: Point, bench: Bench) -> None:
    rows = {row.provider: row for row in bench.rows(point, seconds=0.1, seed=3)}
    assert list(rows) == [peer.name for peer in PEERS]
    cost = Cost.of(Problem.random(point, CPU, seed=3).call)
    for name, row in rows.items():
        if name == "sdpa cudnn, replica":
            assert row.status == "unavailable: PyTorch has it on GPUs only, not on 'cpu'"
            assert row.median_us is None
            continue
        assert row.status == "ok"
        assert not row.failed
        assert row.median_us is not None
        assert row.p20_us is not None
        assert row.p80_us is not None
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.sets == 3
        assert row.peak_bytes is not None
        assert row.peak_bytes >= row.bytes
        assert row.point == point
        assert row.fraction_of_floor == pytest.approx(row.floor_us / row.median_us)
    assert rows[OURS].bytes == cost.bytes
    assert rows["sdpa flash, replica"].bytes == cost.bytes_replicated
    assert rows[NO_PREFIX].bytes < cost.bytes
    assert rows[OURS].floor_us == pytest.approx(1e6 * max(cost.bytes, cost.flops) / 1e9)


@pytest.mark.parametrize("breakage", ["slightly off", "unwritten", "unstable"])
def test_a_wrong_kernel_is_refused_without_a_time(bench: Bench, breakage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = torch_sdpa.forward, []

    def broken(call: Any) -> Any:
        out, lse = run(call)
        calls.append(call)
        if breakage == "slightly off":
            out = out + 1e-3
        elif breakage == "unwritten":
            whole, out = out, torch.empty_like(out)
            out[:, :, :, 1:] = whole[:, :, :, 1:]
        elif len(calls) > 1:  # right at first, wrong when it is repeated
            out = out.roll(1, dims=0)
        return out, lse

    monkeypatch.setattr(torch_sdpa, "forward", broken)
    only_ours = replace(bench, peers=[Ours(OURS, "torch"), SdpaReplica(SDPBackend.FLASH_ATTENTION)])
    ours, theirs = only_ours.rows(DECODE, seconds=0.05, seed=4)
    assert ours.failed
    assert ours.status.startswith("wrong when repeated: " if breakage == "unstable" else "wrong: ")
    assert ours.median_us is None
    assert ours.gb_per_s is None
    assert (ours.error is None) == (breakage == "unwritten")
    assert not theirs.failed
    assert theirs.median_us is not None


def test_a_peer_may_err_twice_as_much_and_is_no_failure_of_ours(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(Ours):
        """Ours, and then off by so many times what eager attention errs."""

        def __init__(self, name: str, ours: bool, times: float) -> None:
            super().__init__(name, "torch")
            self.ours, self.times = ours, times

        def prepare(self, problem: Problem) -> Any:
            right, off = torch_sdpa.forward(problem.call)[0], self.times * Reference.of(problem).eager_error
            return lambda: right + off

    peers = [Off("prefix_attn", True, 3.2), Off("close", False, 3.2), Off("far", False, 6.0)]
    rows = replace(bench, peers=peers).rows(DECODE, seconds=0.05, seed=4)
    assert [row.failed for row in rows] == [True, False, True]
    assert [row.median_us is None for row in rows] == [True, False, True]
    assert Outcome(None, {"decode": rows}).failed
    theirs = Outcome(None, {"decode": rows[1:]})
    assert not theirs.failed
    (line,) = tables.without_time(theirs.rows["decode"])
    assert str(line).startswith("far: wrong: error")
    assert line.style == "bold red"


def test_what_a_peer_raises_is_its_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(problem: Problem) -> Any:
        raise ValueError("not this shape\nand a second line")

    ours, theirs = Ours(OURS, "torch"), SdpaReplica(SDPBackend.MATH)
    for peer in (ours, theirs):
        monkeypatch.setattr(peer, "prepare", refuse)
    rows = replace(bench, peers=[ours, theirs]).rows(DECODE, seconds=0.05, seed=5)
    assert [row.status for row in rows] == ["refused: ValueError: not this shape"] * 2
    assert [row.failed for row in rows] == [True, False]  # a kernel of ours must run


def test_large_replicas_are_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.compare.REPLICA_LIMIT", 100)
    rows = {row.provider: row for row in bench.rows(DECODE, seconds=0.05, seed=6)}
    assert rows["sdpa math, replica"].status.startswith("skipped: 3 replicas of ")
    assert rows[OURS].status == "ok"


def test_the_check_is_strict() -> None:
    problem = Problem.random(DECODE, CPU, seed=7)
    reference = Reference.of(problem)
    assert reference.rows == [0, 1, 3, 4]
    out = Ours(backend="torch").prepare(problem)()
    assert reference.check(out, problem)[1] is None
    for spoiled in (out * 1.001, out.flip(0), out.masked_fill(out == out.max(), float("nan"))):
        assert reference.check(spoiled, problem)[1] is not None


def test_reference_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.random(PREFILL, CPU, seed=8)
    whole = Reference.of(problem)
    monkeypatch.setattr("benchmarks.peers.check.MAX_SCORES", 1)
    torch.testing.assert_close(Reference.of(problem).exact, whole.exact)


def test_problems_differ_and_repeat(bench: Bench) -> None:
    comparison = _Comparison(bench, DECODE, seed=9)
    first, second, _ = comparison.problems
    assert not torch.equal(first.q, second.q)
    assert torch.equal(Problem.random(DECODE, CPU, seed=9).k, first.k)
    assert first.task_ids.tolist() == [0, 1, 0, 1, 0]
    assert first.prefix.lens.tolist() == [32, 32]


def test_stored_and_summarised(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / bench.environment.slug / f"{bench.environment.file_name}.jsonl"
    assert path.parent.name == "test-gpu-9000"
    assert path.stem.endswith("-abc")
    stale = bench.rows(DECODE, seconds=0.05, seed=10)
    rows = bench.rows(DECODE, seconds=0.05, seed=11) + bench.rows(PREFILL, seconds=0.05, seed=12)
    record.append(path, stale)
    record.append(path, rows)
    assert sorted(record.read(path, record.Row), key=str) == sorted(rows, key=str)
    page = summary.markdown(record.read(path, record.Row), bench.environment, ["decode left out"])
    for expected in ("# Test GPU 9000", "decode left out.", "## decode", "## prefill", "best peer", "geometric mean",
                     "unavailable: PyTorch has it on GPUs only"):  # fmt: skip
        assert expected in page
    assert record.read(tmp_path / "none.jsonl", record.Row) == []


def test_roofs_on_a_cpu() -> None:
    found = measure_roofs(CPU, ("float32",), Sizes(copy_bytes=10**6, cached_bytes=10**4, matmul=64, launches=4))
    assert min(found.bytes_per_s, found.cache_bytes_per_s, found.flops_per_s["float32"], found.launch_us) > 0
    assert found.floor_us(Cost(bytes=0, flops=0, bytes_replicated=0), "float32") == found.launch_us


def test_a_roof_is_the_best_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    class Disturbed:
        calls, outs = 2, list[torch.Tensor]()
        left = iter([9.0, *[5.0] * 6, 2.0])  # a warm-up, then the repeats

        def seconds(self, replays: int) -> float:
            return next(self.left)

    monkeypatch.setattr(roofs, "runner_for", lambda calls, device: (Disturbed(), ""))
    assert roofs._best_seconds([], CPU) == 1.0


def test_roofs_of_a_busy_machine_say_so(bench: Bench) -> None:
    assert bench.roofs.warning is None
    assert "busy" not in summary.markdown(bench.rows(DECODE, seconds=0.05, seed=1), bench.environment)
    disturbed = replace(bench, roofs=replace(bench.roofs, bytes_per_s=31e9, cache_bytes_per_s=0.067e9))
    expected = "the machine is busy: 0.067 GB/s within the cache, 31 GB/s outside of it"
    assert expected in summary.markdown(disturbed.rows(DECODE, seconds=0.05, seed=1), bench.environment)
    outcome = Outcome(None, roofs=disturbed.roofs)
    for show in (tables.everything, tables.ratios):
        assert any(expected in str(part) for part in show(outcome))


def test_a_replica_made_in_the_call_is_counted_once(bench: Bench) -> None:
    point = replace(DECODE, batch=8, tasks=4, m=64, n=1)  # nearly all is prefix
    (row,) = replace(bench, peers=[SdpaConcatenated()]).rows(point, seconds=0.05, seed=1)
    cost = Cost.of(Problem.random(point, CPU, seed=1).call)
    assert row.peak_bytes is not None
    made = cost.bytes_replicated * 1.5  # keys and values, and while the latter are joined, those of the prefixes alone
    assert row.peak_bytes == pytest.approx(cost.bytes + made, rel=0.05)


def test_memory_is_what_is_held_at_once() -> None:
    x = torch.ones(1000)

    def call() -> torch.Tensor:
        for _ in range(3):
            both = torch.cat([x, x])  # 8 kB; the one before lives until it is made
        return both.view(2, 1000)[0] + x  # 4 kB

    assert allocated_at_once(call, CPU) == 16_000
    assert allocated_at_once(lambda: x[:3], CPU) == 0
