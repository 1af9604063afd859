"""The fused Triton kernels; see kernels/README.md. Triton is imported by the first call."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from prefix_attn import regime
from prefix_attn.kernels.launch import Operands
from prefix_attn.types import AttentionCall, Gradients, PerInput

choose_regime = regime.choose

#: Nothing is read back; a row with a bad id or key bound becomes NaN.
READS_IDS = False

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MIN_CAPABILITY = (8, 0)

#: Elements between two keys, or two elements of one, that 32-bit offsets within a tile of 128 keys can bridge.
MAX_STRIDE = 2**22

#: Why the kernels cannot be imported, or None. (Triton itself is imported by the first call.)
TRITON_MISSING = "Triton is not installed; install prefix-attn[triton]" if find_spec("triton") is None else None


def refusal(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call here, or None."""
    if call.q.dtype not in DTYPES:
        return f"the kernels accumulate in float32 and take {', '.join(map(str, DTYPES))}, not {call.q.dtype}"
    if not MIN_HEAD_DIM <= call.head_dim <= MAX_HEAD_DIM:
        return f"the kernels take head_dim {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, not {call.head_dim}"
    if call.relative_bias is not None and call.relative_bias.requires_grad and torch.is_grad_enabled():
        return "its backward kernels have no gradient of relative_bias, which requires one; use backend='torch'"
    stride = max(*call.k.stride()[-2:], *call.v.stride()[-2:], *call.prefix.k.stride()[1:], *call.prefix.v.stride()[1:])
    if stride > MAX_STRIDE:
        return f"keys have a stride of {stride} elements, the kernels take {MAX_STRIDE}; call .contiguous() on k and v"
    device = "cuda" if call.q.is_cuda else call.q.device.type
    if device == "cpu" and not interpreting():
        return (
            "the tensors are on the CPU, where Triton only interprets, slowly; set TRITON_INTERPRET=1 before "
            "Triton is imported to allow that"
        )
    if device not in ("cuda", "cpu"):
        return f"the kernels run on NVIDIA and AMD GPUs, not on {device!r}"
    if device == "cuda" and torch.version.hip is None and capability(call.q.device) < MIN_CAPABILITY:
        return f"Triton needs an NVIDIA GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later"
    return TRITON_MISSING


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU, asked once: each call of each layer comes here."""
    if torch.compiler.is_compiling():  # which makes it a constant, and would warn of a cache
        return torch.cuda.get_device_capability(device)
    return _capability(device)


_capability = cache(torch.cuda.get_device_capability)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Out in q's layout, and lse (float32) if ``call.return_lse``; grouped decode if the call has tiles."""
    q, operands = call.q, operands_of(call)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if call.return_lse else None
    with _device_of(q):
        if call.tiles is not None:
            from prefix_attn.kernels.grouped import grouped_attention

            grouped_attention(operands, *call.tiles, out, lse, max_len=call.prefix.expected_max_len)
        elif regime.use_decode(call.q_len, call.group):
            from prefix_attn.kernels.decode import decode_attention

            decode_attention(operands, out, lse, batch_invariant=call.batch_invariant)
        else:
            from prefix_attn.kernels.prefill import prefill_attention

            prefill_attention(operands, out, lse)
    return out, lse


def saves_lse(call: AttentionCall) -> bool:
    """Its backward computes the scores again, and their softmax from lse."""
    return True


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
    needed: PerInput[bool],
) -> Gradients:  # fmt: skip
    """Gradients in the dtypes of the inputs; the same bits for the same inputs."""
    from prefix_attn.kernels.backward import attention_backward

    if lse is None:  # somebody called the operator itself, without asking for it
        lse = forward(replace(call, return_lse=True))[1]
        assert lse is not None, "forward returns lse where it is asked for"
    with _device_of(call.q):
        q, k, v, prefix_k, prefix_v, sinks = attention_backward(
            operands_of(call), out, lse, grad_out, grad_lse, needed[:6]
        )
    return PerInput(q, k, v, prefix_k, prefix_v, sinks, relative_bias=None)  # which is refused


def operands_of(call: AttentionCall) -> Operands:
    """The call as the launchers take it."""
    prefix = call.prefix
    return Operands(
        q=call.q, k=call.k, v=call.v, prefix_k=prefix.k, prefix_v=prefix.v, starts=prefix.starts, lens=prefix.lens,
        task_ids=call.task_ids, kv_start=call.kv_start, kv_len=call.kv_len, sinks=call.sinks, causal=call.causal,
        scale=call.scale, window=call.window, softcap=call.softcap, relative_bias=call.relative_bias,
    )  # fmt: skip


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of x."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()


def interpreting() -> bool:
    """Whether Triton kernels of this process run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
