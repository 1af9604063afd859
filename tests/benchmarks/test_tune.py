"""The search for tile configs: what is tried, what is dropped, what is kept and where it goes. No GPU is needed."""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import tune
from benchmarks.peers import Point, Problem
from benchmarks.peers.check import Reference
from benchmarks.record import Environment
from benchmarks.timing import Runner
from benchmarks.tune import HEADS, SPACE, WORKLOADS, Result, Target, best, launch, try_candidates, unfit, write
from prefix_attn.backends import reference
from prefix_attn.kernels import config
from prefix_attn.kernels.config import TileConfig, heuristic, shared_bytes, shared_limit

CPU = torch.device("cpu")
ENVIRONMENT = Environment.read(CPU, "abc")
TARGETS = [Target.of(kind, head_dim, "bfloat16") for kind in SPACE for head_dim in HEADS]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.key)
def test_candidates_fit_and_the_heuristic_is_among_them(target: Target) -> None:
    tiles = target.candidates("sm_90")
    assert tiles[0] == heuristic(target.kind, target.head_dim, 2, "sm_90", target.block_m)
    assert len(tiles) == len(set(tiles)) > 3
    assert all(shared_bytes(target.kind, tile, target.head_dim, 2, "sm_90") <= shared_limit("sm_90") for tile in tiles)
    assert len(target.candidates("sm_86")) < len(tiles) or target.head_dim == 64
    assert all(point.head_dim == target.head_dim for point in target.points)
    assert len({tile.block_m for tile in tiles}) == (2 if target.kind == "prefill" else 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tiles are tiny; a GPU runs the real ones")
@pytest.mark.parametrize("kind", SPACE)
def test_a_candidate_runs_its_kernel_with_its_config(kind: str) -> None:
    point = Point("prefill" if kind == "prefill" else "decode", 3, 2, 32, 20, 4, 2, 16, "float32")
    problem = Problem.random(point, CPU, seed=1)
    check = Reference.of(problem).check
    for tile in (TileConfig(16, 16, 4, 2), TileConfig(32, 32, 4, 1)):
        assert check(launch(kind, problem, tile)(), problem)[1] is None


def small(monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target of tiny problems."""
    monkeypatch.setitem(HEADS, 16, (2, 1))
    monkeypatch.setitem(WORKLOADS, "decode", ((2, 1, 16, 5), (3, 2, 16, 5)))
    monkeypatch.setattr("benchmarks.timing.MAX_SETS", 2)
    return Target.of("decode", 16, "float32")


FAST, SLOW, WRONG, BROKEN = (TileConfig(16, n, 4, 2) for n in (32, 64, 128, 16))


def pretended(problem: Problem, tile: TileConfig) -> Callable[[], Tensor]:
    if tile == BROKEN:
        raise RuntimeError("out of resource: shared memory\nand more")
    out, _ = reference.attend(problem.call, torch.float32)
    return lambda: out + 1e-2 if tile == WRONG else out.clone()


def by_keys(runners: Mapping[str, Runner], seconds: float) -> dict[str, float]:
    """A clock that takes a tile's keys for microseconds."""
    return {name: float(re.findall(r"block_n=(\d+)", name)[0]) for name in runners}


def test_only_what_is_right_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = small(monkeypatch)
    results = try_candidates(target, [SLOW, WRONG, BROKEN, FAST], CPU, 60, pretended, by_keys)
    first, second = (str(point) for point in target.points)
    found = {(result.config, result.workload): (result.status, result.median_us) for result in results}
    assert found[SLOW, first] == found[SLOW, second] == ("ok", 64.0)
    assert found[FAST, second] == ("ok", 32.0)
    assert found[WRONG, first][0].startswith("wrong: ")
    assert found[BROKEN, first] == ("refused: RuntimeError: out of resource: shared memory", None)
    assert (WRONG, second) not in found  # what failed once is not tried again
    assert best(results, SLOW) == FAST


def test_time_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    results = try_candidates(small(monkeypatch), [SLOW, FAST], CPU, 0, pretended, by_keys)
    assert [result.status for result in results[:2]] == ["left out for want of time", "ok"]
    assert best(results, SLOW) == SLOW
    assert best([], SLOW) is None


def test_the_heuristic_stays_unless_another_gains_enough() -> None:
    def results(fast: float, slow: float) -> list[Result]:
        return [Result("k", FAST, "a", "ok", fast), Result("k", SLOW, "a", "ok", slow)]

    assert best(results(10.0, 10.1), SLOW) == SLOW
    assert best(results(10.0, 10.3), SLOW) == FAST
    partly = [*results(1.0, 10.0), Result("k", SLOW, "b", "ok", 3.0), Result("k", FAST, "b", "wrong: x")]
    assert best(partly, FAST) == SLOW  # timed on every workload


def test_written_choices_are_what_the_kernels_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "configs" / "test_gpu.json"
    monkeypatch.setattr(config, "tuned_file", lambda device: path)
    monkeypatch.setattr(config, "target_of", lambda device: "sm_90")
    target, device = Target.of("decode", 128, "bfloat16"), torch.device("cuda", 7)
    results = [Result(target.key, FAST, "a", "ok", 3.0), Result(target.key, SLOW, "", "8 bytes spilled")]
    write(path, {target.key: SLOW, "prefill/64/float16/0": WRONG}, results, ENVIRONMENT)
    write(path, {target.key: FAST}, results[:1], ENVIRONMENT)
    caches: list[Any] = [config.tuned_configs, config.config_for]
    for function in caches:
        function.cache_clear()
    try:
        assert config.tuned_configs(device) == {target.key: FAST, "prefill/64/float16/0": WRONG}
        assert config.config_for("decode", 128, torch.bfloat16, device, rows=4) == FAST
        assert config.config_for("prefill", 128, torch.bfloat16, device) == heuristic("prefill", 128, 2, "sm_90", 0)
    finally:
        for function in caches:
            function.cache_clear()
    lines = [json.loads(line) for line in path.with_suffix(".timings.jsonl").read_text().splitlines()]
    assert [(line["config"]["block_n"], line["median_us"]) for line in lines] == [(32, 3.0), (64, None), (32, 3.0)]
    assert {line["commit"] for line in lines} == {"abc"}


def test_spilling_candidates_are_found_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # for the processes that compile
    target = replace(Target.of("decode", 128, "bfloat16"), block_m=64)
    fits, spills = TileConfig(64, 64, 4, 2), TileConfig(64, 128, 2, 2)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = unfit(target, [fits, spills], "sm_90", pool)
    assert list(found) == [spills]
    assert "spilled" in found[spills]


def command(*arguments: str) -> Any:
    app = tune.typer.Typer()
    app.command()(tune.main)
    return CliRunner().invoke(app, list(arguments))


def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = command()
    assert result.exit_code == 2
    assert "finds none; nothing was run" in result.output
    assert "expected some of decode, decode_few, grouped, prefill" in command("--kinds", "decode,warmup").output


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command believes in a GPU; what it would run there is computed on the CPU."""
    small(monkeypatch)
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(config, "tuned_file", lambda device: path)
    monkeypatch.setattr(config, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(Environment, "read", lambda device, commit: ENVIRONMENT)
    monkeypatch.setattr(tune, "unfit", lambda target, tiles, name, pool: {WRONG: "spills"})
    monkeypatch.setattr(tune, "clock", by_keys)
    monkeypatch.setattr(tune, "launch", lambda kind, problem, tile: pretended(problem, tile))
    search = tune.try_candidates
    monkeypatch.setattr(tune, "try_candidates", lambda target, tiles, device, *more: search(target, tiles, CPU, *more))
    return path


def test_the_command(pretended_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--kinds", "decode", "--head-dims", "16", "--dtypes", "float32")
    result = command(*arguments, "--budget", "20")
    assert result.exit_code == 0, result.output
    (chosen,) = json.loads(pretended_gpu.read_text()).values()
    assert chosen["block_n"] == min(SPACE["decode"]["block_n"])
    assert str(pretended_gpu) in result.output

    result = command(*arguments, "--budget", "5")
    assert "left out for want of time: decode/16/float32/16" in result.output

    def lost(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune, "try_candidates", lost)
    result = command(*arguments)
    assert result.exit_code == 1
    assert "illegal memory access" in result.output
    assert json.loads(pretended_gpu.read_text())
