"""The PyTorch operators of the package: ``prefix_attn::attention`` and ``prefix_attn::attention_backward``.

One operator a layer call, whatever the backend. `torch.compile` sees one node of known shapes and strides, and traces
into nothing that a backend does, be it a kernel launch or a read of task ids on the host; autograd gets the gradients
that the same backend computes. Where nothing in PyTorch has to see the operator, the backend is called directly.
Triton is imported by its first real call, not by this registration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from prefix_attn import dispatch
from prefix_attn.checks import check_values
from prefix_attn.errors import BackendUnavailable
from prefix_attn.plan import BatchPlan, RowTiles
from prefix_attn.transforms import differentiable, refuse_tangents, transformed
from prefix_attn.types import AttentionCall, PerInput, PrefixKV

T = TypeVar("T")

#: A call's tensors that have gradients come first, in the order of `PerInput`.
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? sinks, Tensor? relative_bias, "
    "Tensor starts, Tensor lens, Tensor task_ids, Tensor? kv_start, Tensor? kv_len, Tensor? planned, Tensor? tasks, "
    "Tensor? members, bool causal, float scale, int? window, float? softcap, bool return_lse, bool batch_invariant, "
    "SymInt max_len, str backend"
)
_ATTENTION, _BACKWARD = "prefix_attn::attention", "prefix_attn::attention_backward"

torch.library.define(_ATTENTION, f"({_CALL}) -> (Tensor out, Tensor lse)", tags=(torch.Tag.needs_fixed_stride_order,))
torch.library.define(
    _BACKWARD,
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool[7] needed, {_CALL}) -> "
    f"({', '.join(f'Tensor grad_{name}' for name in PerInput._fields)})",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

#: Types of arguments for which PyTorch calls no ``__torch_function__`` or ``__torch_dispatch__``.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def attention(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` of a checked call; ``backend`` as in `dispatch.choose`.

    out has q's dtype and layout; lse is float32 (float64 for float64 inputs), and None or of no meaning unless
    ``call.return_lse``.

    Raises:
        UnknownTask, ShapeError: a task id or a key bound on the host is out of range.
        BackendUnavailable: ``backend`` cannot run the call, or an input has a forward-mode derivative.
    """
    refuse_tangents(call.q, call.k, call.v, call.prefix.k, call.prefix.v, call.sinks, call.relative_bias)
    needs_grad = call.needs_grad
    direct = not needs_grad and can_bypass_operator(call)
    backend, _, regime = (dispatch.choose_again if direct else dispatch.choose)(call, backend)
    call.tiles = tiles = None
    if regime is not None and regime.name == "grouped":
        plan = call.plan or BatchPlan(call.task_ids, call.prefix.lens)
        call.tiles = tiles = plan.tiles(call.q_len * call.group)
    if direct:
        return _run(call, backend)
    planned, tasks, members = tiles or (None, None, None)
    prefix = call.prefix
    return_lse = call.return_lse or (needs_grad and dispatch.BACKENDS[backend].saves_lse(call))
    operator = _transformed_attention if needs_grad and transformed() else torch.ops.prefix_attn.attention
    result: tuple[Tensor, Tensor] = operator(
        call.q, call.k, call.v, prefix.k, prefix.v, call.sinks, call.relative_bias, prefix.starts, prefix.lens,
        call.task_ids, call.kv_start, call.kv_len, planned, tasks, members, call.causal, call.scale, call.window,
        call.softcap, return_lse, call.batch_invariant, prefix.expected_max_len, backend,
    )  # fmt: skip
    return result


def can_bypass_operator(call: AttentionCall) -> bool:
    """Whether PyTorch would do nothing but pass the operator's arguments on, which alone takes longer than the rest.

    It does more for a compiler, a tracer, a profiler, a transform of functions, a mode, tensors without memory, their
    subclasses, and views that stand for the negative of what memory holds.
    """
    prefix, q, k, v, sinks, bias = call.prefix, call.q, call.k, call.v, call.sinks, call.relative_bias
    prefix_k, prefix_v = prefix.k, prefix.v
    integers = (prefix.starts, prefix.lens, call.task_ids, call.kv_start, call.kv_len)
    return (
        not torch.compiler.is_compiling()
        and not q.is_meta
        and _PLAIN.issuperset(map(type, (q, k, v, prefix_k, prefix_v, sinks, bias, *integers)))
        # One by one: a loop would take as long again.
        and not (q.is_neg() or k.is_neg() or v.is_neg() or prefix_k.is_neg() or prefix_v.is_neg())
        and (sinks is None or not sinks.is_neg())
        and (bias is None or not bias.is_neg())
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
        and not torch._C._autograd._profiler_enabled()
    )


def _run(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor | None]:
    """What the operator does; lse only if it was asked for."""
    if call.q.numel() == 0:
        return _empty_outputs(call)
    module = dispatch.BACKENDS[backend]
    if module.READS_IDS or call.task_ids.is_cpu:
        check_values(call, rows=not getattr(module, "CHECKS_VALUES", False))
    out, lse = _without_autocast(call, module.forward, call)
    if not call.return_lse:
        return _in_layout_of(call.q, out), None
    assert lse is not None, "a backend returns lse where it is asked for"
    return _in_layout_of(call.q, out), lse.contiguous()


def _without_autocast(call: AttentionCall, function: Callable[..., T], *arguments: Any) -> T:
    """Run a backend's function in the precision that it asks for: autocast would lower that of its matrix products."""
    if not torch._C._is_any_autocast_enabled():
        return function(*arguments)
    with torch.autocast(call.q.device.type, enabled=False):
        return function(*arguments)


@torch.library.impl(_ATTENTION, ("cpu", "cuda"))
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend = _call(*arguments)
    out, lse = _run(call, backend)
    return out, _placeholder(call) if lse is None else lse


@torch.library.impl(_BACKWARD, ("cpu", "cuda"))
def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needed: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    call, backend = _call(*arguments)
    inputs = arguments[: len(needed)]
    if call.q.numel() == 0:
        return tuple(
            torch.zeros_like(x) if need else _placeholder(call) for x, need in zip(inputs, needed, strict=True)
        )
    saved = lse if call.return_lse else None
    backward = dispatch.BACKENDS[backend].backward
    grads = _without_autocast(call, backward, call, out, saved, grad_out, grad_lse, PerInput(*needed))
    return tuple(
        _in_layout_of(x, grad) if need and grad is not None else _placeholder(call)
        for x, grad, need in zip(inputs, grads, needed, strict=True)
    )


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(_call(*arguments)[0])


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needed: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    call, _ = _call(*arguments)
    inputs = arguments[: len(needed)]
    return tuple(torch.empty_like(x) if need else _placeholder(call) for x, need in zip(inputs, needed, strict=True))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*tensors, *output)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    inputs = [other if x is None else x for x, other in zip(tensors, ctx.others, strict=True)]
    count = len(PerInput._fields)
    needed = ctx.needs_input_grad[:count]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if grad_lse is not None and grad_lse.numel() == 0:
        grad_lse = None  # of an lse that was not asked for
    refuse_tangents(grad_out, grad_lse, *inputs[:count])
    operator = _transformed_backward if transformed() else torch.ops.prefix_attn.attention_backward
    grads = operator(grad_out, grad_lse, out, lse, needed, *inputs)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * (len(inputs) - count)


def _refuse_to_differentiate(ctx: Any, *grads: Tensor) -> None:
    raise BackendUnavailable(
        "prefix_attention is differentiable once: no backend has second derivatives. Leave out create_graph=True"
    )


torch.library.register_fake(_ATTENTION, _forward_fake)
torch.library.register_fake(_BACKWARD, _backward_fake)
torch.library.register_autograd(_ATTENTION, _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd(_BACKWARD, _refuse_to_differentiate)

_transformed_attention = differentiable(torch.ops.prefix_attn.attention, _save_for_backward, _differentiate)
_transformed_backward = differentiable(
    torch.ops.prefix_attn.attention_backward, lambda ctx, inputs, output: None, _refuse_to_differentiate
)


def _call(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, sinks: Tensor | None,
    relative_bias: Tensor | None, starts: Tensor, lens: Tensor, task_ids: Tensor, kv_start: Tensor | None,
    kv_len: Tensor | None, planned: Tensor | None, tasks: Tensor | None, members: Tensor | None, causal: bool,
    scale: float, window: int | None, softcap: float | None, return_lse: bool, batch_invariant: bool, max_len: int,
    backend: str,
) -> tuple[AttentionCall, str]:  # fmt: skip
    """The call that these arguments of an operator describe, and the backend to run it."""
    tiles = None if planned is None or tasks is None or members is None else RowTiles(planned, tasks, members)
    return AttentionCall(
        q=q, k=k, v=v, prefix=PrefixKV(prefix_k, prefix_v, starts, lens, max_len), task_ids=task_ids,
        kv_start=kv_start, kv_len=kv_len, causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks,
        relative_bias=relative_bias, return_lse=return_lse, batch_invariant=batch_invariant, tiles=tiles,
    ), backend  # fmt: skip


def _empty_outputs(call: AttentionCall) -> tuple[Tensor, Tensor]:
    lse = call.q.new_empty(call.q.shape[:3], dtype=call.lse_dtype) if call.return_lse else _placeholder(call)
    return torch.empty_like(call.q), lse


def _placeholder(call: AttentionCall) -> Tensor:
    """What stands for a result that was not asked for."""
    return call.q.new_empty((0,), dtype=call.lse_dtype)


def _in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """The result in the dtype and layout of x: a model that computes ``[batch, len, heads, D]`` gets that back."""
    if result.stride() == x.stride() and result.dtype == x.dtype:
        return result
    like = torch.empty_like(x)
    if result.stride() == like.stride() and result.dtype == x.dtype:
        return result
    return like.copy_(result)
