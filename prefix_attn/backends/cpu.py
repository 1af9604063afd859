"""Attention on a CPU through kernels/cpu/attention.cpp, which is compiled on first use; forward only."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from prefix_attn.backends.compile_cpu import ELEMENTS, library, missing
from prefix_attn.checks import MAX_HEAD_DIM, check_values
from prefix_attn.types import AttentionCall

#: Ids and key bounds are in the host's memory.
READS_IDS = True

#: `forward` itself raises for a bad id or key bound.
CHECKS_VALUES = True

#: What the kernel returns for them.
OUT_OF_RANGE = 1

#: Query heads that share a kv head.
MAX_GROUP = 256

#: Every head dim, at its own index: looked up, one that a compiler knows as a symbol becomes a number for `_missing`.
_HEAD_DIMS = tuple(range(MAX_HEAD_DIM + 1))

#: `Call` in kernels/cpu/part.h: pointers, integers, floats.
_CALL = struct.Struct("14P 29q 2d")


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run this call here, or None."""
    q, prefix = call.q, call.prefix
    if not q.is_cpu:
        return f"its kernel runs on CPUs, not on {q.device.type!r}"
    if q.dtype not in ELEMENTS:
        return f"its kernel accumulates in float32 and takes {', '.join(map(str, ELEMENTS))}, not {q.dtype}"
    if (group := call.group) > MAX_GROUP:
        return f"its kernel takes {MAX_GROUP} query heads per kv head at most, not {group}"
    if call.needs_grad:
        return "it has no backward, and a tensor requires grad"
    if not (call.k.stride(3) == call.v.stride(3) == prefix.k.stride(2) == prefix.v.stride(2) == 1):
        return (
            "the head dim of k, v, prefix.k and prefix.v must be contiguous; call .contiguous() on the one that is not"
        )
    why_not: str | None = _missing(_HEAD_DIMS[call.head_dim], q.dtype)
    return why_not


def runs(*tensors: Tensor) -> bool:
    """Whether q, k and v like these can be given to the kernel."""
    q = tensors[0]
    contiguous = all(x.is_cpu and x.stride(-1) == 1 for x in tensors)
    return contiguous and q.dtype in ELEMENTS and _missing(_HEAD_DIMS[q.shape[-1]], q.dtype) is None


def _missing(head_dim: int, dtype: torch.dtype) -> str | None:
    """`missing`, into which `torch.compile` does not look."""
    return missing(head_dim, dtype)


# What torch.compiler.assume_constant_result sets; it would also import dynamo, which takes seconds.
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Out in q's layout, and lse (float32) if ``call.return_lse``."""
    q, k, v, prefix = call.q, call.k, call.v, call.prefix
    batch, q_heads, q_len, head_dim = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty((batch, q_heads, q_len), dtype=torch.float32) if call.return_lse else None
    sinks, bias = _floats(call.sinks), _floats(call.relative_bias)
    ids, starts, lens = call.task_ids.contiguous(), prefix.starts.contiguous(), prefix.lens.contiguous()
    kv_start = None if call.kv_start is None else call.kv_start.contiguous()
    kv_len = None if call.kv_len is None else call.kv_len.contiguous()
    k_shape = k.shape
    arguments = _CALL.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), prefix.k.data_ptr(), prefix.v.data_ptr(), out.data_ptr(),
        0 if lse is None else lse.data_ptr(), starts.data_ptr(), lens.data_ptr(), ids.data_ptr(),
        0 if kv_start is None else kv_start.data_ptr(), 0 if kv_len is None else kv_len.data_ptr(),
        0 if sinks is None else sinks.data_ptr(), 0 if bias is None else bias.data_ptr(),
        batch, k_shape[1], q_heads // k_shape[1], q_len, k_shape[2], lens.shape[0],
        0 if bias is None else bias.shape[1] // 2,
        *q.stride(), *out.stride(), *k.stride()[:3], *v.stride()[:3], *prefix.k.stride()[:2], *prefix.v.stride()[:2],
        call.window or 0, call.causal, call.batch_invariant, torch.get_num_threads(),
        call.scale, call.softcap or 0.0,
    )  # fmt: skip
    status = library(head_dim, q.dtype).attention(arguments)
    if status == OUT_OF_RANGE:
        check_values(call)
    if status != 0:
        raise MemoryError("prefix_attention: no memory for the partial results on the CPU")
    return out, lse


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()
