"""Where Triton's kernels can run, and how to launch them there."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

MIN_CAPABILITY = (8, 0)

#: Why the kernels cannot be imported, or None. (Triton itself is imported by the first call.)
TRITON_MISSING = "Triton is not installed; install prefix-attn[triton]" if find_spec("triton") is None else None


def refusal_on(device: torch.device) -> str | None:
    """Why no kernel can run on a device here, or None."""
    kind = device.type  # asked for once: it is a string that PyTorch makes each time
    if kind == "cpu" and not interpreting():
        return (
            "the tensors are on the CPU, where Triton only interprets, slowly; set TRITON_INTERPRET=1 before "
            "Triton is imported to allow that"
        )
    if kind not in ("cuda", "cpu"):
        return f"the kernels run on NVIDIA and AMD GPUs, not on {kind!r}"
    if kind == "cuda" and torch.version.hip is None and capability(device) < MIN_CAPABILITY:
        return f"Triton needs an NVIDIA GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later"
    return TRITON_MISSING


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU, asked once: each call of each layer comes here."""
    if torch.compiler.is_compiling():  # the compiler makes it a constant, and would warn of the cache
        return torch.cuda.get_device_capability(device)
    return _capability(device)


_capability = cache(torch.cuda.get_device_capability)


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """A context in which the device of x is current, since Triton launches on the current device."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()


def interpreting() -> bool:
    """Whether Triton kernels of this process run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
