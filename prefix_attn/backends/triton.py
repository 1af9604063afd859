"""The fused Triton kernels; see kernels/README.md. Triton is imported by the first call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from prefix_attn import regime
from prefix_attn.kernels.device import device_of, refusal_on
from prefix_attn.transforms import requires_grad, transformed
from prefix_attn.types import AttentionCall, Gradients, PerInput

choose_regime = regime.choose

#: Nothing is read back; a row with a bad id or key bound becomes NaN.
READS_IDS = False

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_HEAD_DIM = 16

#: Elements between two keys, or two elements of a head, that 32-bit offsets within a tile of 128 keys can bridge.
MAX_STRIDE = 2**22


def refusal(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call here, or None."""
    if call.q.dtype not in DTYPES:
        return f"the kernels accumulate in float32 and take {', '.join(map(str, DTYPES))}, not {call.q.dtype}"
    if call.head_dim < MIN_HEAD_DIM:
        return f"the kernels take head_dim from {MIN_HEAD_DIM} on, not {call.head_dim}"
    bias = call.relative_bias
    wanted = bias is not None and (bias.requires_grad or (transformed() and requires_grad(bias)))
    if wanted and torch.is_grad_enabled():
        return "its backward kernels have no gradient of relative_bias, which requires one; use backend='torch'"
    k, v, pk, pv = call.k.stride(), call.v.stride(), call.prefix.k.stride(), call.prefix.v.stride()
    stride = max(call.q.stride(3), k[2], k[3], v[2], v[3], pk[1], pk[2], pv[1], pv[2])
    if stride > MAX_STRIDE:
        return (
            f"q or keys have a stride of {stride} elements, the kernels take {MAX_STRIDE}; call .contiguous() on them"
        )
    return refusal_on(call.q.device)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Out in q's layout, and lse (float32) if ``call.return_lse``; grouped decode if the call has tiles."""
    q = call.q
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if call.return_lse else None
    grouped_attention, decode_attention, prefill_attention = _launchers()
    with device_of(q):
        if call.tiles is not None:
            grouped_attention(call, *call.tiles, out, lse, max_len=call.prefix.expected_max_len)
        elif regime.use_decode(call.q_len, call.group):
            decode_attention(call, out, lse, batch_invariant=call.batch_invariant)
        else:
            prefill_attention(call, out, lse)
    return out, lse


@cache
def _launchers() -> tuple[Callable[..., None], ...]:
    """The three ways forward. Each call importing what it needs would take it half a microsecond."""
    from prefix_attn.kernels.decode import decode_attention
    from prefix_attn.kernels.grouped import grouped_attention
    from prefix_attn.kernels.prefill import prefill_attention

    return grouped_attention, decode_attention, prefill_attention


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
    with device_of(call.q):
        q, k, v, prefix_k, prefix_v, sinks = attention_backward(call, out, lse, grad_out, grad_lse, needed[:6])
    return PerInput(q, k, v, prefix_k, prefix_v, sinks, relative_bias=None)  # which is refused
