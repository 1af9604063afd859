"""flash-attn's functions, for those who have the package (extra ``flash``): prefixes and own keys apart, then merged.

- prefixes: the queries of all rows of a task, side by side, are one sequence of ``flash_attn_varlen_func``, and the
  task's prefix its keys, copied at each call (sequences have no gaps between them, the bank's prefixes do);
- own keys: ``flash_attn_with_kvcache``, with the row's padding and length.

Forward only, and it reads task ids on the host: "auto" never takes it. Written from the functions' documentation of
versions 2.6.3 to 2.8; what they answer for a query without keys differs between versions and is not used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from prefix_attn.backends.by_task import Readers, merge, readers_in, with_sinks
from prefix_attn.types import AttentionCall

#: To sort rows by task.
READS_IDS = True

DTYPES = (torch.float16, torch.bfloat16)


def refusal(call: AttentionCall) -> str | None:
    """Why flash-attn cannot run this call here, or None."""
    if (missing := unavailable(call.q.device)) is not None:
        return missing
    if call.q.dtype not in DTYPES:
        return f"flash-attn takes {', '.join(map(str, DTYPES))}, not {call.q.dtype}"
    if call.head_dim % 8:
        return f"flash-attn takes head_dim in multiples of 8, not {call.head_dim}"
    if call.scale <= 0:
        return f"flash-attn takes a positive scale, not {call.scale}"
    if call.needs_grad:
        return "flash_attn_with_kvcache has no backward, and a tensor requires grad; use backend='torch'"
    if call.batch_invariant:
        return "it cuts keys by what fills the GPU, so bits depend on the batch; use backend='triton'"
    if call.relative_bias is not None:
        return "flash-attn has no relative_bias; use backend='torch'"
    # What a compiler traces cannot read lengths.
    compiling = torch.compiler.is_compiling()
    longest = call.prefix.k.shape[1] if compiling else max((m for _, m in call.prefix.spans), default=0)
    if call.window is not None and longest + call.kv_capacity > call.window:
        return (
            f"a window of {call.window} tokens may cut prefixes of up to {longest} before {call.kv_capacity} own keys, "
            "and flash-attn's windows end at the newest key of their own part; use backend='triton'"
        )
    return None


def unavailable(device: torch.device) -> str | None:
    """Why there is no flash-attn on a device, or None."""
    if device.type != "cuda":
        return f"flash-attn runs on GPUs, not on {device.type!r}"
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed; install prefix-attn[flash]"
    try:
        package()
    except Exception as e:  # an extension compiled for another PyTorch fails in many ways
        return f"flash-attn is installed, but cannot be imported ({type(e).__name__}: {e})"
    return None


def package() -> Any:
    """The module ``flash_attn``."""
    return import_module("flash_attn")


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Out, and lse; both float32."""
    out, lse = _own(call)
    readers = readers_in(call)
    if readers.groups:
        rows = readers.rows(call).to(out.device)
        out[rows], lse[rows] = merge(out[rows], lse[rows], *_prefixes(call, readers, rows))
    return (out, lse) if call.sinks is None else with_sinks(out, lse, call.sinks)


def _own(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention over own keys: ``[B, H, Q, D]`` and ``[B, H, Q]``, float32."""
    device, n = call.q.device, call.kv_capacity
    if n == 0:
        out = torch.zeros_like(call.q, dtype=torch.float32)
        return out, out.new_full(out.shape[:3], float("-inf"))
    ends = torch.full_like(call.task_ids, n) if call.kv_len is None else call.kv_len
    starts = torch.zeros_like(ends) if call.kv_start is None else torch.minimum(call.kv_start, ends)
    found, found_lse = package().flash_attn_with_kvcache(
        *(x.transpose(1, 2) for x in (call.q, call.k, call.v)), cache_seqlens=ends, cache_leftpad=starts,
        softmax_scale=call.scale, causal=call.causal, softcap=call.softcap or 0.0, return_softmax_lse=True,
    )  # fmt: skip
    query = (ends - call.q_len)[:, None] + torch.arange(call.q_len, device=device)  # [B, Q]
    last = torch.minimum(ends[:, None], query + 1) if call.causal else ends[:, None]
    blind = (last <= starts[:, None])[:, None].expand(-1, call.q_heads, call.q_len)
    out = found.transpose(1, 2).float().masked_fill(blind[..., None], 0.0)
    return out, found_lse.float().masked_fill(blind, float("-inf"))


def _prefixes(call: AttentionCall, readers: Readers, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of ``rows``, sorted by task, over their prefixes: ``[rows, H, Q, D]`` and ``[rows, H, Q]``, float32."""
    device, q_len = call.q.device, call.q_len
    lens, counts = [m for _, m, _ in readers.groups], [count * q_len for _, _, count in readers.groups]
    tokens = torch.cat([torch.arange(start, start + m, device=device) for start, m, _ in readers.groups])
    k, v = (x[:, tokens].transpose(0, 1) for x in (call.prefix.k, call.prefix.v))  # [tokens, kv_heads, D]
    q = call.q[rows].transpose(1, 2).flatten(0, 1)  # [rows * Q, H, D]
    q_ends, k_ends = (
        torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=device) for x in (counts, lens)
    )  # [tasks + 1] x 2
    out, lse, *_ = package().flash_attn_varlen_func(
        q, k, v, q_ends, k_ends, max(counts), max(lens), softmax_scale=call.scale, causal=False,
        softcap=call.softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    out = out.unflatten(0, (len(rows), q_len)).transpose(1, 2)
    return out.float(), lse.float().unflatten(1, (len(rows), q_len)).transpose(0, 1)
