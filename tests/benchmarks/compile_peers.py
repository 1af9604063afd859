"""The peers' own kernels compiled for sm_90 at some of the grid's head shapes; prints what came out as JSON.

No GPU is needed. Run by test_peers.py in a process of its own, where kernels are not interpreted.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compile_report import cuda_usage
from benchmarks.peers import gathered_kernel, paged_kernel
from benchmarks.peers.paging import PAGE
from prefix_attn.kernels.config import TileConfig, padded_head_dim, slices
from prefix_attn.kernels.launch import LAUNCH_OPTIONS


def compiled(fn: Any, config: TileConfig, constants: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, int]:
    """Parameters are bfloat16 pointers, multiples of 16, and 32-bit integers, but for ``constants`` and ``types``."""
    names = [parameter.name for parameter in fn.params]
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    kernel = triton.compile(
        ASTSource(fn=fn, signature=signature, constexprs=dict(constants), attrs=aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages} | LAUNCH_OPTIONS,
    )
    ptx = kernel.asm["ptx"]
    registers, spills = cuda_usage(kernel.asm["cubin"])
    return {
        "registers": registers, "spills": spills, "shared": kernel.metadata.shared,
        "mma": len(re.findall(r"\bmma\.sync|wgmma", ptx)),
        "wide copies": len(re.findall(r"cp\.async\.c[ag][^;]*, 0x10,", ptx)),
    }  # fmt: skip


def paged(group: int, head_dim: int, split: bool, few: bool) -> dict[str, int]:
    """With rows split, and few programs, or not."""
    config = paged_kernel.tile_shape(group, head_dim, itemsize=2, few=few)
    constants: dict[str, Any] = {
        "KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "PAGE": PAGE, "SPLIT": split,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": padded_head_dim(head_dim),
        "SLICES": slices(config.block_m, config.block_n, config.num_warps, head_dim, torch.bfloat16),
    }  # fmt: skip
    if not split:
        constants["lse_ptr"] = None
    types = {"table_ptr": "*i32", "lengths_ptr": "*i32", "lse_ptr": "*fp32", "scale_log2": "fp32"}
    return compiled(paged_kernel.paged_kernel, config, constants, types | {"out_ptr": "*fp32" if split else "*bf16"})


def gathered(group: int, head_dim: int) -> dict[str, int]:
    config = gathered_kernel.tile_shape(group, head_dim)
    rows = gathered_kernel.ROWS
    constants: dict[str, Any] = {
        "GROUP": group, "HEAD_DIM": head_dim, "ALIGN": 16, "ROWS": rows, "BLOCK_M": config.block_m,
        "KEYS": config.block_n // rows, "BLOCK_D": padded_head_dim(head_dim),
    }  # fmt: skip
    constants |= {f"stride_{name}_dim": 1 for name in ("q", "k", "v", "prefix_k", "prefix_v", "out")}
    tables = dict.fromkeys(("starts_ptr", "lens_ptr", "tasks_ptr", "members_ptr"), "*i32")
    return compiled(gathered_kernel.gathered_kernel, config, constants, tables | {"scale_log2": "fp32"})


if __name__ == "__main__":
    rows = {
        "paged": [paged(4, 128, True, True), paged(4, 128, False, False), paged(2, 256, False, False)],
        "gathered": [gathered(4, 128), gathered(1, 128), gathered(1, 64)],
    }
    print(json.dumps(rows[sys.argv[1]]))
