"""The PyTorch operator behind the Triton backend: ``prefix_attn::attention``, one per layer call.

An operator keeps `torch.compile` from tracing into the launchers, and works in CUDA graphs: it reads nothing back from
the device. Triton is imported by its first real call, not by its registration. Forward only: autograd does not see it.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from prefix_attn.plan import RowTiles
from prefix_attn.types import AttentionCall

#: Query rows per kv head (q_len * group) up to which a row is decoded; more make tiles worth a prefill.
DECODE_ROWS = 64

torch.library.define(
    "prefix_attn::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor starts, Tensor lens, Tensor task_ids, "
    "Tensor? kv_start, Tensor? kv_len, Tensor? sinks, bool causal, float scale, int? window, float? softcap, "
    "bool return_lse, bool batch_invariant, Tensor? planned, Tensor? tasks, Tensor? members, int max_len) "
    "-> (Tensor out, Tensor lse)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def attention(call: AttentionCall, tiles: RowTiles | None = None) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a checked call: out in q's dtype and layout, lse float32, empty unless ``call.return_lse``.

    With ``tiles`` it runs grouped decode.
    """
    prefix = call.prefix
    planned, tasks, members = tiles or (None, None, None)
    result: tuple[Tensor, Tensor] = torch.ops.prefix_attn.attention(
        call.q, call.k, call.v, prefix.k, prefix.v, prefix.starts, prefix.lens, call.task_ids, call.kv_start,
        call.kv_len, call.sinks, call.causal, call.scale, call.window, call.softcap, call.return_lse,
        call.batch_invariant, planned, tasks, members, prefix.expected_max_len,
    )  # fmt: skip
    return result


@torch.library.impl("prefix_attn::attention", ("cpu", "cuda"))
def _attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor, lens: Tensor,
    task_ids: Tensor, kv_start: Tensor | None, kv_len: Tensor | None, sinks: Tensor | None, causal: bool, scale: float,
    window: int | None, softcap: float | None, return_lse: bool, batch_invariant: bool, planned: Tensor | None,
    tasks: Tensor | None, members: Tensor | None, max_len: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from prefix_attn.kernels.decode import decode_attention
    from prefix_attn.kernels.grouped import grouped_attention
    from prefix_attn.kernels.launch import Operands
    from prefix_attn.kernels.prefill import prefill_attention

    out, lse = _outputs(q, return_lse)
    if out.numel() == 0:
        return out, lse
    operands = Operands(
        q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, starts=starts, lens=lens, task_ids=task_ids,
        kv_start=kv_start, kv_len=kv_len, sinks=sinks, causal=causal, scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    # Triton launches on the current device, which need not be q's.
    elsewhere = q.device.type == "cuda" and q.device.index != torch.cuda.current_device()
    with torch.cuda.device(q.device) if elsewhere else nullcontext():
        if planned is not None and tasks is not None and members is not None:
            grouped_attention(operands, planned, tasks, members, out, lse if return_lse else None, max_len=max_len)
        elif use_decode(operands.q_len, operands.group):
            decode_attention(operands, out, lse if return_lse else None, batch_invariant=batch_invariant)
        else:
            prefill_attention(operands, out, lse if return_lse else None)
    return out, lse


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor, lens: Tensor,
    task_ids: Tensor, kv_start: Tensor | None, kv_len: Tensor | None, sinks: Tensor | None, causal: bool, scale: float,
    window: int | None, softcap: float | None, return_lse: bool, batch_invariant: bool, planned: Tensor | None,
    tasks: Tensor | None, members: Tensor | None, max_len: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(q, return_lse)


torch.library.register_fake("prefix_attn::attention", _attention_fake)


def _outputs(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    # q's layout: a model that computes [batch, q_len, heads, head_dim] gets it back without a copy.
    return torch.empty_like(q), q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)


def use_decode(q_len: int, group: int) -> bool:
    """Whether a call goes to the decode kernel: its rows fit one tile, or are one query."""
    return q_len == 1 or q_len * group <= DECODE_ROWS
