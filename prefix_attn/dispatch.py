"""Which backend runs a call, and why.

``"auto"`` takes the first of `AUTO_ORDER` that does not refuse. A named backend runs or raises.

A backend is a module in prefix_attn/backends, whose ``forward`` and ``backward`` only the operators (ops.py) call.
Each has

- ``refusal(call)``: why it cannot run this call here, or None;
- ``forward(call)``: ``(out, lse)``; lse may be None unless ``call.return_lse``;
- ``READS_IDS``: whether ``forward`` waits for task ids on an accelerator. If so, the operator checks ids and key bounds
  before it on every device, otherwise only where they are on a CPU.

One that has gradients, and so does not refuse every call that needs one, also has

- ``backward(call, out, lse, grad_out, grad_lse, needed)``: at least those `Gradients` that ``needed`` marks; lse may be
  None unless ``saves_lse`` is true, and grad_lse may be None;
- ``saves_lse(call)``: whether ``backward`` needs the lse of the forward pass.

Two more are optional:

- ``choose_regime(call)``, where there are several ways to run a call: the one it takes, and why;
- ``CHECKS_VALUES = True``, where ``forward`` itself raises for bad ids and key bounds, so that the operator need not
  check them. (Where prefixes lie in the bank it checks all the same.)
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

#: Backends whose ``refusal`` and ``choose_regime`` follow from a call's layout and options, and from no value of its
#: tensors: `choose_again` asks them once for all calls that are alike.
REMEMBERED = frozenset(("auto", *AUTO_ORDER, "reference"))


class BackendChoice(NamedTuple):
    """A backend, why it was taken, and the regime in which it runs the call, if it has several."""

    name: str
    reason: str
    regime: Regime | None

    @classmethod
    def of(cls, call: AttentionCall, name: str, reason: str) -> BackendChoice:
        """Backend ``name``, and what it chooses for itself."""
        choose_regime = getattr(BACKENDS[name], "choose_regime", None)
        return cls(name, reason, None if choose_regime is None else choose_regime(call))


def refusal(name: str, call: AttentionCall) -> str | None:
    """Why backend ``name`` cannot run ``call`` here; None if it can."""
    why_not: str | None = BACKENDS[name].refusal(call)
    return why_not


def choose(call: AttentionCall, backend: str = "auto") -> BackendChoice:
    """The backend for this call.

    Raises:
        BackendUnavailable: ``backend`` is not a known name, or cannot run this call; never falls back.
    """
    if backend == "auto":
        refused: list[str] = []
        for name in AUTO_ORDER:
            why_not = "no GPU holds these tensors" if name == "triton" and not call.q.is_cuda else refusal(name, call)
            if why_not is None:
                return BackendChoice.of(call, name, "; ".join([*refused, f"{name}: can run this call"]))
            refused.append(f"{name}: {why_not}")
        raise BackendUnavailable(f"backend='auto': no backend can run this call: {'; '.join(refused)}")
    if backend not in BACKENDS:
        raise BackendUnavailable(f"backend: expected 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    why_not = refusal(backend, call)
    if why_not is not None:
        raise BackendUnavailable(
            f"backend={backend!r} cannot run this call: {why_not}. Use backend='auto' to let the package choose"
        )
    return BackendChoice.of(call, backend, "named by the caller")


def choose_again(call: AttentionCall, backend: str) -> BackendChoice:
    """`choose`, remembered for all calls that are alike, such as those of a step's other layers.

    For calls that need no gradient and bypass the operator.

    Raises:
        BackendUnavailable: as `choose`.
    """
    if backend not in REMEMBERED:
        return choose(call, backend)
    plan, known = call.plan, call.layout.known
    key = (
        backend, call.batch_invariant, call.return_lse, call.sinks is None, call.prefix.expected_max_len,
        -2 if plan is None else -1 if plan.distinct is None else plan.distinct,
    )  # fmt: skip
    choice: BackendChoice | None = known.get(key)
    if choice is None:
        choice = known[key] = choose(call, backend)
    return choice
