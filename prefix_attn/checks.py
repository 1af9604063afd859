"""The one place where arguments of `prefix_attention` are checked.

Shapes and dtypes by `checked_call`; values by `check_values`, inside the operator, where `torch.compile` does not see
that they are read. Values on an accelerator are read only where the backend waits for them anyway; kernels that do not
wait answer a bad one with NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from prefix_attn.errors import DTypeError, ShapeError, UnknownTask
from prefix_attn.plan import BatchPlan
from prefix_attn.types import AttentionCall, PrefixKV

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
MAX_HEAD_DIM = 256  # what kernels and flash-attn take at most, which therefore do not check it again
MAX_INT = 2**31 - 1
MAX_WINDOW = 2**30  # no row is longer, and its sums with positions fit 32 bits


def checked_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: PrefixKV,
    task_ids: Tensor | Sequence[int],
    *,
    kv_start: Tensor | Sequence[int] | None = None,
    kv_len: Tensor | Sequence[int] | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    plan: BatchPlan | None = None,
) -> AttentionCall:
    """Check every argument's shape and dtype against q and return the call; see `prefix_attention` for the rules."""
    _check_tensors(q, k, v, prefix)
    batch = q.shape[0]
    if not type(causal) is type(return_lse) is type(batch_invariant) is bool:
        raise DTypeError(
            "causal, return_lse, batch_invariant: expected bools, got "
            f"{causal!r}, {return_lse!r} and {batch_invariant!r}"
        )
    # Zero takes the sign off -0.0, which kernels would give to the bias that they divide by the scale.
    scale = q.shape[3] ** -0.5 if scale is None else float(scale) + 0.0
    if not -math.inf < scale < math.inf:
        raise ShapeError(f"scale: expected None or a finite number, got {scale}")
    if window is not None:
        window = _checked_window(window)
    if softcap is not None:
        softcap = float(softcap)
        if not 0 < softcap < math.inf:
            raise ShapeError(f"softcap: expected None or a positive finite number, got {softcap}")
    if sinks is not None:
        _check_float("sinks", sinks, q)
        if sinks.shape != (q.shape[1],):
            raise ShapeError(f"sinks: expected [q_heads] = [{q.shape[1]}], got {list(sinks.shape)}")
    if relative_bias is not None:
        _check_float("relative_bias", relative_bias, q)
        _check_distances(relative_bias, q)
    if plan is not None and (plan.task_ids.shape != (batch,) or plan.task_ids.device != q.device):
        raise ShapeError(
            f"plan: expected one for [batch] = [{batch}] rows on {q.device}, got {list(plan.task_ids.shape)} on "
            f"{plan.task_ids.device}; make one per batch (bank.plan(task_ids))"
        )
    return AttentionCall(
        q=q, k=k, v=v, prefix=prefix, task_ids=_row_integers("task_ids", task_ids, batch, q.device),
        kv_start=None if kv_start is None else _row_integers("kv_start", kv_start, batch, q.device),
        kv_len=None if kv_len is None else _row_integers("kv_len", kv_len, batch, q.device),
        causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks, relative_bias=relative_bias,
        return_lse=return_lse, batch_invariant=batch_invariant, plan=plan,
    )  # fmt: skip


def check_values(call: AttentionCall, rows: bool = True) -> None:
    """Raise for a prefix outside the bank's tokens, a task id that is neither -1 nor a live task, and a key bound
    outside the keys; waits for them.

    rows: False where the backend itself looks at ids and key bounds.
    """
    spans = call.prefix.spans
    if not rows:
        return
    for row, t in enumerate(call.task_ids.tolist()):
        if t != -1 and not (0 <= t < len(spans) and spans[t][1] >= 0):
            live = [i for i, (_, m) in enumerate(spans) if m >= 0]
            raise UnknownTask(f"task_ids[{row}]: expected -1 (no prefix) or one of {live}, got {t}")
    for name, bounds in (("kv_start", call.kv_start), ("kv_len", call.kv_len)):
        for row, value in enumerate(() if bounds is None else bounds.tolist()):
            if not 0 <= value <= call.kv_capacity:
                raise ShapeError(f"{name}[{row}]: expected 0 to k.shape[2] = {call.kv_capacity}, got {value}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, prefix: PrefixKV) -> None:
    if not isinstance(prefix, PrefixKV):
        raise DTypeError(f"prefix: expected a PrefixKV (PrefixKV.pack, or bank.layer), got {type(prefix).__name__}")
    # A decode step comes here once a layer: each property of a tensor is read once.
    q_shape, k_shape, prefix_shape = q.shape, k.shape, prefix.k.shape
    if len(q_shape) != 4 or len(k_shape) != 4:
        raise ShapeError(
            "q, k: expected [batch, q_heads, q_len, head_dim] and [batch, kv_heads, kv_len, head_dim], "
            f"got {list(q_shape)} and {list(k_shape)}"
        )
    if k_shape != v.shape:
        raise ShapeError(f"k, v: expected equal shapes, got {list(k_shape)} and {list(v.shape)}")
    batch, q_heads, _, head_dim = q_shape
    kv_heads = k_shape[1]
    if batch != k_shape[0] or head_dim != k_shape[3]:
        raise ShapeError(f"q, k: expected the same batch and head_dim, got {list(q_shape)} and {list(k_shape)}")
    if kv_heads == 0 or q_heads % kv_heads:
        raise ShapeError(
            f"q, k: expected [batch, heads, len, head_dim], and q_heads a multiple of kv_heads, got {q_heads} and "
            f"{kv_heads} heads"
        )
    if prefix_shape[0] != kv_heads or prefix_shape[2] != head_dim:
        raise ShapeError(
            f"prefix, k: expected the same kv_heads and head_dim, got {prefix_shape[0]} and "
            f"{prefix_shape[2]} in prefix, {kv_heads} and {head_dim} in k"
        )
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ShapeError(f"q: expected head_dim from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    dtype, device = q.dtype, q.device
    if dtype not in FLOATS:
        raise DTypeError(f"q: expected a dtype among {FLOATS}, got {dtype}")
    for name, x in (("k", k), ("v", v), ("prefix.k", prefix.k), ("prefix.v", prefix.v)):
        if x.dtype != dtype or x.device != device:
            raise DTypeError(
                f"{name}: expected {dtype} on {device} like q, got {x.dtype} on {x.device}; "
                "convert it (a bank follows its model: PrefixBank.for_model)"
            )


def _check_float(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype not in FLOATS or x.device != q.device:
        raise DTypeError(f"{name}: expected a dtype among {FLOATS} on {q.device}, got {x.dtype} on {x.device}")


def _check_distances(table: Tensor, q: Tensor) -> None:
    if table.ndim != 2 or table.shape[0] != q.shape[1] or table.shape[1] % 2 == 0:
        raise ShapeError(
            f"relative_bias: expected [q_heads, 2R + 1] with q_heads = {q.shape[1]}, an entry for each distance -R..R, "
            f"got {list(table.shape)}"
        )


def _checked_window(window: int) -> int:
    if not isinstance(window, int):
        try:
            window = index(window)
        except TypeError as error:
            raise DTypeError(f"window: expected None or an integer, got {window!r}") from error
    if isinstance(window, bool):
        raise DTypeError(f"window: expected None or an integer, got {window}")
    if window < 1:
        raise ShapeError(f"window: expected None or at least 1 token, got {window}")
    return min(window, MAX_WINDOW)


def _row_integers(name: str, x: Tensor | Sequence[int], batch: int, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor):
        x = list(x)
        try:
            x = torch.tensor(x, dtype=None if x else torch.int32, device="cpu")
        except (RuntimeError, TypeError, ValueError) as error:
            raise DTypeError(f"{name}: expected integers, got {x}") from error
    if x.shape != (batch,):
        raise ShapeError(f"{name}: expected one integer per row, [batch] = [{batch}], got {list(x.shape)}")
    if x.dtype not in INTEGERS:
        raise DTypeError(f"{name}: expected an integer dtype, got {x.dtype}")
    if x.dtype == torch.int64:
        x = x.clamp(-MAX_INT, MAX_INT)  # what does not fit must stay out of range: cut off, it could be another task
    return x if x.dtype == torch.int32 and x.device == device else x.to(device=device, dtype=torch.int32)
