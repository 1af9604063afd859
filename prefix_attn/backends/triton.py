"""The fused Triton kernels, through one PyTorch operator; see kernels/README.md."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from prefix_attn import ops
from prefix_attn.plan import BatchPlan
from prefix_attn.regime import choose as choose_regime
from prefix_attn.types import AttentionCall

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MIN_CAPABILITY = (8, 0)

#: Elements between two keys, or two elements of one, that 32-bit offsets within a tile of 128 keys can bridge.
MAX_STRIDE = 2**22

#: Why the kernels cannot be imported, or None. (Triton itself is imported by the operator's first call.)
TRITON_MISSING = "Triton is not installed; install prefix-attn[triton]" if find_spec("triton") is None else None


def refusal(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call here, or None."""
    if call.q.dtype not in DTYPES:
        return f"the kernels accumulate in float32 and take {', '.join(map(str, DTYPES))}, not {call.q.dtype}"
    if not MIN_HEAD_DIM <= call.head_dim <= MAX_HEAD_DIM:
        return f"the kernels take head_dim {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, not {call.head_dim}"
    if call.needs_grad:
        return "it has no backward kernels yet, and a tensor requires grad; use backend='torch', or torch.no_grad()"
    keys = (call.k, call.v, call.prefix.k, call.prefix.v)
    if (stride := max(s for x in keys for s in x.stride()[-2:])) > MAX_STRIDE:
        return f"keys have a stride of {stride} elements, the kernels take {MAX_STRIDE}; call .contiguous() on k and v"
    if call.q.device.type == "cpu" and not interpreting():
        return (
            "the tensors are on the CPU, where Triton only interprets, slowly; set TRITON_INTERPRET=1 before "
            "Triton is imported to allow that"
        )
    if call.q.device.type not in ("cuda", "cpu"):
        return f"the kernels run on NVIDIA and AMD GPUs, not on {call.q.device.type!r}"
    if (
        call.q.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(call.q.device) < MIN_CAPABILITY
    ):
        return f"Triton needs an NVIDIA GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later"
    return TRITON_MISSING


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Out, and lse (float32) if ``call.return_lse``."""
    tiles = None
    if choose_regime(call).name == "grouped":
        plan = call.plan or BatchPlan(call.task_ids, call.prefix.lens)
        tiles = plan.tiles(call.q_len * call.group)
    out, lse = ops.attention(call, tiles)
    return out, lse if call.return_lse else None


def interpreting() -> bool:
    """Whether Triton kernels of this process run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
