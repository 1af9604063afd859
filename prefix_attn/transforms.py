"""The operators under PyTorch's function transforms (`torch.func`) and in its forward mode.

An operator has a derivative in reverse mode only. PyTorch would take its forward-mode derivative for 0, so tensors with
a tangent are refused. `torch.func.grad` and the other transforms need the derivative as a `torch.autograd.Function`
with a separate `setup_context`, which `differentiable` makes of an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from prefix_attn.errors import BackendUnavailable


def transformed() -> bool:
    """Whether a transform of `torch.func` is active; always False in compiled code, where PyTorch cannot be asked."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


def requires_grad(x: Tensor) -> bool:
    """Whether autograd follows ``x``, or a tensor that a transform has wrapped in it."""
    while not x.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(x):
            return False
        x = _functorch.get_unwrapped(x)
    return True


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise for a tensor that carries a forward-mode derivative; costs a comparison where that mode is off.

    Raises:
        BackendUnavailable: there is one.
    """
    if forward_ad._current_level < 0:
        return
    if any(_has_tangent(x) for x in tensors if x is not None):
        raise BackendUnavailable(
            "prefix_attention is not differentiable in forward mode (jvp, jacfwd, linearize, hessian, dual tensors): "
            "no backend has such a derivative. Use reverse mode (backward, grad, vjp, jacrev), or detach its inputs"
        )


def _has_tangent(x: Tensor) -> bool:
    """Whether ``x``, or a tensor that a transform has wrapped in it, has a tangent.

    What jvp has wrapped is taken to have one, since it cannot be looked up below another transform's wrapper.
    """
    stack = _functorch.get_interpreter_stack() or ()
    forward = {layer.level() for layer in stack if layer.key() == _functorch.TransformType.Jvp}
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.maybe_get_level(x) in forward:
            return True
        x = _functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def differentiable(
    operator: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """``operator`` as a function that the transforms can differentiate and map."""
    function: Any = type(
        "PrefixAttention",
        (torch.autograd.Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *arguments: operator(*arguments)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        },
    )
    apply: Callable[..., Any] = function.apply
    return apply
