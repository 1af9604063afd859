"""`prefix_attention`, the operation this package exists for, and `explain`, which says how it would run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack, overload

from torch import Tensor

from prefix_attn import dispatch, ops
from prefix_attn.checks import check_values, checked_call
from prefix_attn.cost import Explanation
from prefix_attn.plan import BatchPlan
from prefix_attn.types import PrefixKV


class Options(TypedDict, total=False):
    """The keywords of `prefix_attention`, for type checkers, but for those that they must see in place."""

    kv_start: Tensor | Sequence[int] | None
    kv_len: Tensor | Sequence[int] | None
    causal: bool
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    relative_bias: Tensor | None
    batch_invariant: bool
    plan: BatchPlan | None


@overload
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: PrefixKV, task_ids: Tensor | Sequence[int], *, backend: str = "auto",
    return_lse: Literal[False] = False, **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip


@overload
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: PrefixKV, task_ids: Tensor | Sequence[int], *, backend: str = "auto",
    return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def prefix_attention(
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
    backend: str = "auto",
    batch_invariant: bool = False,
    plan: BatchPlan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to each row's task prefix, then to the row's own keys.

    Equals ``softmax(scale * q @ [pk; k]^T + mask) @ [pv; v]`` without ever building ``[pk; k]`` for the batch.
    With ``m`` the length of the row's prefix and ``past = kv_len - q_len``, query ``i`` sees

    - prefix slot ``j`` always, or with a window only while ``m + past + i - j < window``;
    - own key ``j`` when ``kv_start <= j < kv_len``, if causal ``j <= past + i``, and with a window
      ``past + i - j < window``.

    Args:
        q: ``[batch, q_heads, q_len, head_dim]``; float16, bfloat16, float32 or float64; any strides.
        k, v: ``[batch, kv_heads, kv_len, head_dim]``; q's dtype and device; kv_len may be 0.
        prefix: one layer's prefixes; ``[kv_heads, tokens, head_dim]`` in q's dtype and device.
        task_ids: integer ``[batch]``; -1 for a row without prefix.
        kv_start: integer ``[batch]``; first valid key (left padding); 0 by default.
        kv_len: integer ``[batch]``; one past the last valid key; ``k.shape[2]`` by default.
        causal: mask own keys, aligned at the bottom right.
        scale: dimensionless; ``head_dim ** -0.5`` by default.
        window: sliding window in tokens, the query's own included.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask.
        sinks: ``[q_heads]``; one extra logit per head in the softmax's denominator.
        relative_bias: float ``[q_heads, 2R + 1]``; entry ``R + d`` is added to a scaled score (before a softcap) at
            distance ``d = key - query``, clipped to -R..R; prefix slot j stands at j, own key j at ``m + j``, query i
            at ``m + past + i`` (without causal at ``m + k.shape[2] - q_len + i``: keys past kv_len are padding behind
            the row). T5's bias, since its buckets end at a largest distance.
        return_lse: also return the log-sum-exp of the visible scores.
        backend: ``"auto"``, or a name in ``prefix_attn.dispatch.BACKENDS``; a named backend runs or raises.
        batch_invariant: the bits of a row depend neither on its place in the batch nor on the other rows.
        plan: ``bank.plan(task_ids)``, to be made once for all layers and steps; without it, each call that needs one
            works it out anew. A plan made for other ids or for an older state of the bank turns the rows it gets wrong
            into NaN.

    Returns:
        ``[batch, q_heads, q_len, head_dim]`` in q's dtype and layout; with ``return_lse`` also
        ``[batch, q_heads, q_len]`` in nats (float32; float64 for float64 inputs). A query that sees nothing gives 0 and
        -inf. Both can be differentiated, once, in reverse mode (also by `torch.func`).

    Raises:
        ShapeError, DTypeError: two arguments disagree; the message names both.
        UnknownTask: a task id is out of range. (The kernels do not read back ids on an accelerator: such a row is NaN.)
        BackendUnavailable: the named backend cannot run this call, or a forward-mode derivative is asked for; the
            message says why.

    Source: prefix tuning, arXiv:2101.00190; shared-prefix decomposition, arXiv:2402.05099; online softmax,
    arXiv:1805.02867.
    """
    call = checked_call(
        q, k, v, prefix, task_ids, kv_start=kv_start, kv_len=kv_len, causal=causal, scale=scale, window=window,
        softcap=softcap, sinks=sinks, relative_bias=relative_bias, return_lse=return_lse,
        batch_invariant=batch_invariant, plan=plan,
    )  # fmt: skip
    out, lse = ops.attention(call, backend)
    if not return_lse:
        return out
    assert lse is not None, "an operator returns lse where it is asked for"
    return out, lse


def reads_in_place(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a row's own keys may lie anywhere among k and v, between kv_start and kv_len, at no cost for the others.

    So where the C++ kernel runs. Other backends take time, or memory, for all of k.
    """
    runs: bool = dispatch.BACKENDS["cpu"].runs(q, k, v)
    return runs


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: PrefixKV,
    task_ids: Tensor | Sequence[int],
    *,
    backend: str = "auto",
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Explanation:
    """Say how `prefix_attention` would run with these arguments, without running it.

    Args: those of `prefix_attention`.

    Returns:
        The backend and its regime, each with the reason, bytes and FLOPs that must be spent, the floor time on the
        device and what sharing saves; print it.
        Reads lengths and task ids back from the device.
    """
    call = checked_call(q, k, v, prefix, task_ids, return_lse=return_lse, **options)
    check_values(call)
    return Explanation.of(call, dispatch.choose(call, backend))
