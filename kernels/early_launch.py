"""Kernels that begin while the one before still runs: programmatic dependent launch, from sm_90 on.

A kernel launched with `early_options` is set up while the last programs of the kernel before it, of any library, come
to their end; `wait_for_previous` returns when all of them have ended and what they wrote can be seen. Every program
calls it before it reads anything. With `let_next_begin` a kernel allows more: the next one, if it is launched so, is
set up as soon as all programs of this one have made that call, and its programs wait wherever there is room.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from prefix_attn.kernels import config


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """The next kernel may begin when all programs of this one have made this call."""
    if EARLY:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Go on when the kernel before has ended."""
    if EARLY:
        cuda.gdc_wait()


def early(device: torch.device) -> bool:
    """Whether a device supports it."""
    target = config.target_of(device)
    return target.startswith("sm_") and int(target.removeprefix("sm_")) >= 90


def early_options(device: torch.device) -> dict[str, Any]:
    """EARLY, and Triton's option, of a kernel that begins early where the device can."""
    return {"EARLY": True, "launch_pdl": True} if early(device) else {"EARLY": False}
