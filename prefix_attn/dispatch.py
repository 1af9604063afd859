"""Which backend runs a call, and why.

A backend is a module with

- ``READS_IDS``: whether it waits for task ids and key bounds on an accelerator, so that they may as well be checked;
- ``CHECKS_VALUES``, if true: its forward raises for bad ids and bounds, which else are checked before it, as where
  prefixes lie always is;
- ``refusal(call)``: why it cannot run this call here, or None;
- ``forward(call)``: ``(out, lse)``; lse may be None unless ``call.return_lse``;
- ``backward(call, out, lse, grad_out, grad_lse, needed)``: at least the `Gradients` that are ``needed``;
- ``saves_lse(call)``: whether ``backward`` wants the forward's lse, which else may be None, as grad_lse may;
- ``choose_regime(call)``, if it has several ways of running: which it takes, and why.

One that refuses whatever needs a gradient goes without ``backward`` and ``saves_lse``. Only the operators (ops.py) call
``forward`` and ``backward``.

``"auto"`` takes the first of `AUTO_ORDER` that does not refuse. A named backend runs or raises.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from prefix_attn.backends import cpu, flash_attn, reference, torch_sdpa, triton
from prefix_attn.errors import BackendUnavailable
from prefix_attn.regime import Regime
from prefix_attn.types import AttentionCall

BACKENDS: dict[str, ModuleType] = {
    "triton": triton, "cpu": cpu, "torch": torch_sdpa, "reference": reference, "flash_attn": flash_attn,
}  # fmt: skip

#: What "auto" tries, in this order: the fused kernels where a GPU holds the tensors (elsewhere Triton could only
#: interpret them, which is for tests), C++ on a CPU that has a compiler, and PyTorch, which refuses nothing.
AUTO_ORDER = ("triton", "cpu", "torch")


class Choice(NamedTuple):
    """A backend, and why it was taken."""

    name: str
    reason: str


def refusal(name: str, call: AttentionCall) -> str | None:
    """Why backend ``name`` cannot run ``call`` here; None if it can."""
    why_not: str | None = BACKENDS[name].refusal(call)
    return why_not


def regime(name: str, call: AttentionCall) -> Regime | None:
    """The way backend ``name`` would run ``call``; None if it has only one."""
    choose_regime = getattr(BACKENDS[name], "choose_regime", None)
    return None if choose_regime is None else choose_regime(call)


def choose(call: AttentionCall, backend: str = "auto") -> Choice:
    """The backend for this call.

    Raises:
        BackendUnavailable: ``backend`` is not a known name, or cannot run this call; never falls back.
    """
    if backend == "auto":
        refused: list[str] = []
        for name in AUTO_ORDER:
            why_not = "no GPU holds these tensors" if name == "triton" and not call.q.is_cuda else refusal(name, call)
            if why_not is None:
                return Choice(name, "; ".join([*refused, f"{name}: can run this call"]))
            refused.append(f"{name}: {why_not}")
        raise BackendUnavailable(f"backend='auto': no backend can run this call: {'; '.join(refused)}")
    if backend not in BACKENDS:
        raise BackendUnavailable(f"backend: expected 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    why_not = refusal(backend, call)
    if why_not is not None:
        raise BackendUnavailable(
            f"backend={backend!r} cannot run this call: {why_not}. Use backend='auto' to let the package choose"
        )
    return Choice(backend, "named by the caller")
