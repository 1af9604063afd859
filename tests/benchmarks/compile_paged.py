"""The paged kernel compiled for sm_90 at two of the grid's head shapes; prints what came out as JSON. No GPU is needed.

Run by test_peers.py in a process of its own, where kernels are not interpreted.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compile_report import cuda_usage
from benchmarks.peers.paged_kernel import paged_kernel, tile_shape
from benchmarks.peers.paging import PAGE
from prefix_attn.kernels.config import padded_head_dim, slices
from prefix_attn.kernels.launch import LAUNCH_OPTIONS

#: Query heads to a kv head, head dim, whether rows are split, and whether programs are few.
SHAPES = [(4, 128, True, True), (4, 128, False, False), (2, 256, False, False)]


def compiled(group: int, head_dim: int, split: bool, few: bool) -> dict[str, int]:
    config = tile_shape(group, head_dim, itemsize=2, few=few)
    constants: dict[str, Any] = {
        "KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "PAGE": PAGE, "SPLIT": split,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": padded_head_dim(head_dim),
        "SLICES": slices(config.block_m, config.block_n, config.num_warps, head_dim, torch.bfloat16),
    }  # fmt: skip
    if not split:
        constants["lse_ptr"] = None
    types = {"table_ptr": "*i32", "lengths_ptr": "*i32", "lse_ptr": "*fp32", "scale_log2": "fp32"}
    types["out_ptr"] = "*fp32" if split else "*bf16"
    names = [parameter.name for parameter in paged_kernel.params]
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    kernel = triton.compile(
        ASTSource(fn=paged_kernel, signature=signature, constexprs=constants, attrs=aligned),
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


if __name__ == "__main__":
    print(json.dumps([compiled(*shape) for shape in SHAPES]))
