"""What the compile report predicts, and what it complains of."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from benchmarks.compile_report import HEAD_DIMS, PLAN, TARGETS, TYPES, Job, Row, complaints, jobs, markdown
from benchmarks.predict import predict

DECODE = {"block_m": 16, "block_n": 64}
GOOD = Row(Job("prefill", "sm_90", 128, "bfloat16"), {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3},
           registers=225, instructions={"wgmma": 24, "cp.async": 48})  # fmt: skip
BIASED = replace(GOOD.job, options=("bias",))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"spills": 8}, "spills 8 bytes"),
        ({"spills": 8, "job": replace(GOOD.job, head_dim=256)}, None),
        ({"shared": 240_000}, "shared memory"),
        ({"instructions": {"cp.async": 48}}, "no tensor-core"),
        ({"instructions": {"mma": 24, "cp.async": 48}}, "no wgmma"),
        ({"job": replace(GOOD.job, target="sm_100")}, "no tcgen05"),
        ({"instructions": {"wgmma": 24}}, "16-byte cp.async"),
        ({"instructions": GOOD.instructions | {"scalar load": 1}}, "scalar loads"),
        ({"job": BIASED, "instructions": GOOD.instructions | {"scalar load": 64}}, None),
        ({"job": BIASED, "instructions": GOOD.instructions | {"scalar load": 64 * 3 + 1}}, "scalar loads"),
        ({"error": "OutOfResources"}, "OutOfResources"),
    ],
)
def test_complaints(changes: dict[str, Any], says: str | None) -> None:
    row = replace(GOOD, **changes)
    assert says in complaints(row)[0] if says else not complaints(row)


def test_every_kernel_and_config_is_compiled_for_every_target_head_dim_and_dtype() -> None:
    tried = jobs(quick=False)
    assert len(set(tried)) == len(tried)
    plain = {(j.kernel, j.target, j.head_dim, j.dtype) for j in tried if not j.options}
    kernels = {j.kernel for j in tried} - {
        "merge",
        *PLAN,
    }  # which read float32 or integers, and have no tile of queries
    assert plain >= set(product(kernels, TARGETS, HEAD_DIMS, TYPES))
    biased = {(j.kernel, j.target, j.head_dim, j.dtype) for j in tried if j.options == ("bias",)}
    assert biased == set(product(kernels, TARGETS, HEAD_DIMS, ("bfloat16", "float32")))
    alone = {"split", "bias"}
    assert {x for j in tried for x in j.options} - alone == {"window", "softcap", "sinks", "lse", "kv_start", "kv_len"}


def test_decode_moves_each_shared_prefix_once_and_loads_it_once_a_row() -> None:
    """B=64, T=8, m=128, n=512, 32 query and 8 key/value heads of 128, as in shared prefixes' floor."""
    work = predict("decode", 128, "bfloat16", group=4, rows=4, config=DECODE)
    assert work is not None
    key, queries = 2 * 8 * 128 * 2, 2 * 32 * 128 * 64 * 2
    assert work.memory == key * (8 * 128 + 64 * 512) + queries
    assert work.cache == key * 64 * (128 + 512) + queries
    assert work.flops == 4 * 8 * 128 * 64 * 16 * (128 + 512)
    assert work.time() == (pytest.approx(1e6 * work.memory / 4.3e12), "memory")


def test_tiles_of_gathered_rows_share_the_reads_of_the_prefix() -> None:
    narrow, wide = (predict("grouped", 128, "bfloat16", 4, 4, {"block_m": rows, "block_n": 64}) for rows in (32, 64))
    assert narrow is not None
    assert wide is not None
    assert narrow.memory == wide.memory
    assert narrow.cache - wide.cache == 2 * 8 * 128 * 2 * 8192 * 4  # eight tiles, then four


def test_prefill_skips_what_lies_above_the_diagonal() -> None:
    """B=16, m=1024, n=2048: all prefix pairs and half the own, up to the tiles on the diagonal."""
    work = predict("prefill", 128, "bfloat16", group=4, rows=0, config={"block_m": 128, "block_n": 64})
    assert work is not None
    exact = 4 * 32 * 128 * 16 * (2048 * 1024 + 2048 * 2049 // 2)
    assert exact < work.flops < 1.02 * exact
    assert work.time()[0] == pytest.approx(1e6 * exact / 790e12, rel=0.05)
    assert work.time(float32=True)[0] > 10 * work.time()[0]


def test_a_kernel_without_a_problem_has_no_prediction() -> None:
    assert predict("copy", 128, "bfloat16", 4, 4, DECODE) is None
    assert " |  |  |  |" in markdown([GOOD], "3.9.0").splitlines()[-1]
