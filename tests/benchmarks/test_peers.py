"""Every peer that can run here computes the same; one that cannot says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import Gathered, OneRegime, Ours, Peer, Point, Problem, SharedPages
from benchmarks.peers.check import Reference, uninitialised_memory_is_nan
from benchmarks.peers.paging import PAGE, Pages, page_ids
from prefix_attn.types import PrefixKV

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
DECODE = Point("decode", 5, 2, 32, 7, **SIZES)
PREFILL = Point("prefill", 3, 2, 16, 6, **SIZES)


def ragged(point: Point, lens: list[int], task_ids: list[int], seed: int = 1) -> Problem:
    """A problem whose prefixes differ in length, with rows in any order."""
    plain = Problem.random(replace(point, batch=len(task_ids), tasks=len(lens)), DEVICE, seed)
    rng = torch.Generator(DEVICE).manual_seed(seed)

    def randn(m: int) -> torch.Tensor:
        return torch.randn(point.kv_heads, m, point.head_dim, generator=rng, device=DEVICE, dtype=plain.q.dtype)

    ids = torch.tensor(task_ids, dtype=torch.int32, device=DEVICE)
    return replace(plain, prefix=PrefixKV.pack([(randn(m), randn(m)) for m in lens]), task_ids=ids)


def check(peer: Peer, problem: Problem) -> None:
    """The peer runs here, and is right."""
    assert peer.unavailable(DEVICE) is None
    assert peer.unsuited(problem.point) is None
    right(peer, problem)


def right(peer: Peer, problem: Problem) -> None:
    with torch.no_grad(), uninitialised_memory_is_nan():
        out = peer.prepare(problem)()
    error, wrong = Reference.of(problem).check(peer.in_batch_order(out, problem), problem)
    assert wrong is None
    assert error is not None


@pytest.mark.parametrize("lens", [[32, 16], [5, 37], [1, 16, 0]], ids=str)
def test_pages_hold_every_key_once(lens: list[int]) -> None:
    ids = [1, 0, 1, len(lens) - 1]
    problem = ragged(DECODE, lens, ids)
    for full_pages_only in (True, False):
        pages = Pages.of(problem, full_pages_only=full_pages_only)
        tables, tokens = pages.row_tables(ids)
        assert [place[1] for place in pages.shared] == [m // PAGE * PAGE if full_pages_only else m for m in lens]
        assert tables[0][: lens[1] // PAGE] == tables[2][: lens[1] // PAGE]
        if not full_pages_only:
            continue
        for b, task in enumerate(ids):
            start, m = problem.prefix.spans[task]
            for paged, prefix, own in ((pages.k, problem.prefix.k, problem.k), (pages.v, problem.prefix.v, problem.v)):
                got = paged[tables[b]].flatten(0, 1)[: tokens[b]].transpose(0, 1)
                assert torch.equal(got, torch.cat([prefix[:, start : start + m], own[b]], dim=1))
    assert page_ids((3, 2 * PAGE + 1)) == [3, 4, 5]
    with pytest.raises(ValueError, match="no task"):
        Pages.of(problem.without_prefix, full_pages_only=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("lens", "own", "sizes"),
    [([32, 16], 7, {}), ([5, 37], 16, {"q_heads": 2}), ([600, 3], 90, {"batch": 1}), ([1], 1, {"head_dim": 24})],
    ids=str,
)
def test_shared_pages(lens: list[int], own: int, sizes: dict[str, int], dtype: str) -> None:
    point = replace(DECODE, n=own, dtype=dtype, **sizes)
    check(SharedPages(), ragged(point, lens, [b % len(lens) for b in range(point.batch)]))


@pytest.mark.parametrize("few", [0, 100])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_shared_pages_in_the_tiles_of_few_programs_and_of_many(
    monkeypatch: pytest.MonkeyPatch, few: int, head_dim: int
) -> None:
    from benchmarks.peers import paged_kernel

    monkeypatch.setattr(paged_kernel, "FEW", few)
    check(SharedPages(), ragged(replace(DECODE, dtype="bfloat16", head_dim=head_dim), [70, 33], [1, 0, 1]))


def test_shared_pages_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.peers import paged_kernel

    for chunks in (2, 3, 16):
        monkeypatch.setattr(paged_kernel, "choose_chunks", lambda *_, count=chunks: count)
        check(SharedPages(), ragged(replace(DECODE, dtype="bfloat16"), [70, 33], [1, 0, 1]))


@pytest.mark.parametrize("lens", [[32, 16], [5, 70], [1, 130]], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((8, 2), 16), ((8, 2), 128), ((4, 4), 64), ((4, 2), 24)], ids=str)
def test_gathered(lens: list[int], heads: tuple[int, int], head_dim: int) -> None:
    """Tiles of four rows, of one, and of two."""
    q_heads, kv_heads = heads
    point = replace(DECODE, n=37, dtype="bfloat16", q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
    check(Gathered(), ragged(point, lens, [1, 0, 1, 1, 0, 1, 1]))
    assert "16-bit" in str(Gathered().unsuited(DECODE))


@pytest.mark.parametrize("peer", [OneRegime("inline"), OneRegime("grouped"), Ours(batch_invariant=True)],
                         ids=lambda p: p.name)  # fmt: skip
def test_ours_made_to_run_in_one_way(peer: Peer) -> None:
    check(peer, ragged(DECODE, [37, 20], [1, 0, 1, 1]))
    assert peer.plan_us is None if peer.name.endswith("inline") else peer.plan_us


def test_a_capture_does_not_plan_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is timed; in a model a plan serves all layers."""
    problem, peer = ragged(replace(DECODE, dtype="bfloat16"), [37, 20], [1, 0, 1, 1]), Ours()
    monkeypatch.setattr("prefix_attn.regime.LAUNCH_BYTES", -1e9)  # grouped always pays
    call = peer.prepare(problem)
    assert peer.plan_us is not None
    monkeypatch.setattr("prefix_attn.plan.recording", lambda tensor: True)
    monkeypatch.setattr("prefix_attn.plan.row_tiles", lambda *_: pytest.fail("planned in the capture"))
    assert Reference.of(problem).check(call(), problem)[1] is None
    peer.prepare(ragged(PREFILL, [37, 20], [1, 0]))
    assert peer.plan_us is None


def test_decode_peers_leave_prefill_out() -> None:
    for peer in (SharedPages(), Gathered(), OneRegime("grouped")):
        assert "decode" in str(peer.unsuited(PREFILL))


@pytest.mark.parametrize(("kernel", "copies"), [("paged", 3 * 2 * 4), ("gathered", 4 * 2 * 8)])
def test_own_kernels_compile_for_sm_90(kernel: str, copies: int) -> None:
    """In another process, where kernels are not interpreted: no spills, and keys in 16-byte asynchronous copies."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.compile_peers", kernel]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = json.loads(answer.stdout)
    assert len(rows) == 3
    for row in rows:
        assert row["spills"] == 0, row
        assert row["mma"] > 0, row
        assert row["wide copies"] >= copies, row
