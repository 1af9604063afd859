"""Default configs compile for GPUs that are not here: no spills up to head_dim 128, tensor cores, pipelined wide loads.

Compiled in another process: in this one kernels are interpreted, unless there is a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefix_attn.kernels.config import (
    SHARED_MEMORY,
    heuristic,
    padded_head_dim,
    shared_bytes,
    shared_limit,
    tuned_configs,
)

#: Kinds of kernels, and the query rows of a decode tile.
KINDS = (("decode", 16), ("decode", 64), ("grouped", 64), ("prefill", 0), ("backward_dq", 0),
         ("backward_dkv", 0), ("biased_decode", 64), ("biased_grouped", 64), ("biased_prefill", 0),
         ("biased_backward_dq", 0), ("biased_backward_dkv", 0))  # fmt: skip


def run_module(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-m", *command], cwd=Path(__file__).parents[2], env=environment,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_default_configs_are_fit() -> None:
    assert "0 unfit" in run_module("benchmarks.compile_report", "--quick", "--check")


def test_a_new_length_batch_or_window_compiles_nothing_and_loads_stay_wide() -> None:
    """One variant each of: plain decode and decode with a window in chunks, both with the tiles for few programs or
    those for many; grouped decode, the two that make its plan, the merge of both, prefill, decode at head_dim 72, and
    the backward kernels, that of the bank in one part or more."""
    kernels = json.loads(run_module("tests.kernels.specialise"))
    names = [f"{name}_kernel" for name in (
        "backward_bank", "backward_bank", "backward_dq", "backward_own", *["decode"] * 5, "delta",
        "grouped", "members", "merge", "prefill", "rank"
    )]  # fmt: skip
    assert sorted(name for name, _ in kernels) == names
    for name, widths in kernels:
        if name not in (
            "merge_kernel",
            "delta_kernel",
            "rank_kernel",
            "members_kernel",
        ):  # 16 bytes; 4 for lse, delta and the rows of a task
            assert widths == (["10", "4"] if name in ("backward_own_kernel", "backward_bank_kernel") else ["10"]), name


@pytest.mark.parametrize("target", [*SHARED_MEMORY, "sm_999", "gfx999"])
def test_heuristic_fits_shared_memory(target: str) -> None:
    for head_dim in (16, 64, 72, 96, 128, 256):
        for itemsize in (2, 4):
            for kind, block_m in KINDS:
                config = heuristic(kind, head_dim, itemsize, target, block_m)
                assert shared_bytes(kind, config, head_dim, itemsize, target) <= shared_limit(target)
                assert config.block_m >= 16
                assert config.block_n >= 16


def test_padded_head_dim() -> None:
    assert [padded_head_dim(d) for d in (16, 17, 64, 72, 80, 96, 128, 129, 256)] == [
        16, 32, 64, 128, 128, 128, 128, 256, 256]  # fmt: skip


def test_no_tuned_file_for_a_cpu() -> None:
    assert tuned_configs(torch.device("cpu")) == {}
