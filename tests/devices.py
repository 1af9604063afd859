"""Accelerators that are not there: tensors that say they are on one, are computed on the CPU, and refuse to mix.

A `Placed` tensor reports a device such as ``privateuseone:1``, for which there is no backend here, and keeps its
numbers in a CPU tensor. As on real accelerators, an operation on tensors of two devices raises (but for tensors of the
CPU without dimensions), and only a copy crosses over. So a model whose layers are on two of them shows whether all that
a layer is given is where it must be.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

#: The device type that PyTorch keeps for backends it does not know.
TYPE = "privateuseone"

#: Why there are none, if the PyTorch at hand lets no Python code stand in for a device.
MISSING = None if hasattr(backend_registration, "_DummyDeviceGuard") else "this PyTorch has no device guards in Python"


@contextmanager
def accelerators() -> Iterator[None]:
    """While this lasts, ``torch.zeros(..., device="privateuseone:0")``, ``x.to(...)`` and the like can be used."""
    _register()
    with _Operations(), _FromData():
        yield


class Placed(torch.Tensor):
    """``inner``, a CPU tensor, under the name of another device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        placed: Placed = make(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=device, requires_grad=inner.requires_grad,
        )  # fmt: skip
        placed.inner = inner
        return placed

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.inner}, device={self.device})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """``torch.tensor`` makes its result without asking a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func not in (torch.tensor, torch.as_tensor) or device is None or torch.device(device).type != TYPE:
            return func(*args, **kwargs)
        return func(*args, **(kwargs | {"device": "cpu"})).to(device)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU, its results where they belong."""
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    copies = func is torch.ops.aten.copy_.default
    devices = {x.device for x in tensors if x.dim() or isinstance(x, Placed)}
    if len(devices) > 1 and not copies:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {sorted(map(str, devices))}")
    home = args[0].device if copies else next(iter(devices), torch.device("cpu"))
    if (asked := kwargs.get("device")) is not None:
        home = torch.device(asked)
        kwargs = kwargs | {"device": torch.device("cpu")}
    wrappers = {id(x.inner): x for x in tensors if isinstance(x, Placed)}  # operations in place return their argument
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Placed) else x, (args, kwargs))

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor) or home.type != TYPE:
            return x
        return wrappers[id(x)] if id(x) in wrappers else Placed(x, home)

    return tree_map(place, func(*args, **kwargs))


@cache
def _register() -> None:
    """What PyTorch itself asks of a device: a guard that has nothing to guard, and a module of its name."""
    guard: Any = backend_registration._DummyDeviceGuard  # type: ignore[attr-defined]
    torch._C._acc.register_python_privateuseone_device_guard(guard())  # type: ignore[attr-defined]
    module = types.ModuleType(f"torch.{TYPE}")
    vars(module).update(_lazy_init=lambda: None, _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None)
    torch._register_device_module(TYPE, module)
