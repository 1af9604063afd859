"""From tensors to kernel arguments: strides, alignment, the scale in base 2. What every attention kernel shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LOG2_E = math.log2(math.e)

#: Multiply-add fusion is Triton's default up to 3.9 and no longer from 3.10: said, so that bits do not depend on it.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class Operands:
    """The inputs of one attention call, as in `prefix_attn.types.AttentionCall`.

    q: ``[batch, q_heads, q_len, head_dim]``; k, v: ``[batch, kv_heads, kv_len, head_dim]``; prefix_k, prefix_v:
    ``[kv_heads, tokens, head_dim]``; starts, lens: int32 ``[tasks]``; task_ids, kv_start, kv_len: int32 ``[batch]``;
    sinks: ``[q_heads]``; relative_bias: ``[q_heads, 2R + 1]``. Any strides.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    starts: Tensor
    lens: Tensor
    task_ids: Tensor
    kv_start: Tensor | None
    kv_len: Tensor | None
    sinks: Tensor | None
    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    relative_bias: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def q_len(self) -> int:
        return self.q.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def expected_keys(self) -> int:
        """Keys of a row as far as shapes tell: the capacity of its own, and a mean prefix."""
        return self.k.shape[2] + self.prefix_k.shape[1] // max(1, self.lens.shape[0])

    def arguments(self, out: Tensor, lse: Tensor | None) -> dict[str, Any]:
        """Keyword arguments of a kernel that writes ``out`` (any strides) and ``lse`` (contiguous)."""
        scale_log2, softcap_inner = score_scales(self.scale, self.softcap)
        return {
            **strided(
                q=self.q if self.scale >= 0 or self.softcap is not None else -self.q, k=self.k, v=self.v,
                prefix_k=self.prefix_k, prefix_v=self.prefix_v, out=out,
            ),
            "lse_ptr": lse, "sinks_ptr": self.sinks,
            "scale_log2": scale_log2, "softcap_inner": softcap_inner, **self.row_arguments(),
        }  # fmt: skip

    def kind(self, kernel: str) -> str:
        """The kernel's name in `kernels.config`."""
        return kernel if self.relative_bias is None else f"biased_{kernel}"

    def bias_arguments(self) -> dict[str, Any]:
        """Arguments of a relative bias, or of none."""
        table = self.relative_bias
        return {
            "bias_ptr": table,
            "stride_bias_head": 0 if table is None else table.stride(0),
            "stride_bias_entry": 0 if table is None else table.stride(1),
            "bias_reach": 0 if table is None else table.shape[1] // 2,
            "bias_scale": bias_scale(self.scale, self.softcap),
            "BIAS_OF_SLOTS": not self.causal,
        }

    def row_arguments(self) -> dict[str, Any]:
        """Arguments that say which keys each query sees, and the sizes."""
        return {
            "task_ids_ptr": self.task_ids, "starts_ptr": self.starts.contiguous(), "lens_ptr": self.lens.contiguous(),
            "kv_start_ptr": self.kv_start, "kv_len_ptr": self.kv_len,
            "stride_task_ids": self.task_ids.stride(0),
            "stride_kv_start": 0 if self.kv_start is None else self.kv_start.stride(0),
            "stride_kv_len": 0 if self.kv_len is None else self.kv_len.stride(0),
            "kv_heads": self.kv_heads, "q_len": self.q_len, "kv_capacity": self.k.shape[2],
            "num_tasks": self.lens.shape[0],
            # A wider window hides nothing more, and its sums with positions would not fit 32 bits.
            "window": None if self.window is None else min(self.window, 2**30),
            "GROUP": self.group, "HEAD_DIM": self.head_dim,
            # The one query of a row sees all its keys up to its end.
            "CAUSAL": self.causal and self.q_len > 1,
        }  # fmt: skip


def strided(**tensors: Tensor) -> dict[str, Any]:
    """``x_ptr`` and ``stride_x_<axis>`` of tensors ``[(batch,) heads, seq, dim]``, and ALIGN.

    Strides are in units of ALIGN elements, but for those of dim: so the compiler sees how wide it may load, for one
    more variant per alignment only.
    """
    align = math.gcd(16, *(stride for x in tensors.values() for stride in x.stride()[:-1]))
    arguments: dict[str, Any] = {"ALIGN": align}
    for name, x in tensors.items():
        arguments |= {f"{name}_ptr": x, f"stride_{name}_dim": x.stride(-1)}
        outer = ("batch", "head", "seq")[4 - x.ndim :]
        arguments |= {f"stride_{name}_{axis}": s // align for axis, s in zip(outer, x.stride(), strict=False)}
    return arguments


def bias_scale(scale: float, softcap: float | None) -> float:
    """What a bias is multiplied by to be added to what `score_scales` are applied to."""
    if softcap is not None:
        return 1 / softcap
    return LOG2_E / score_scales(scale, None)[0]


def score_scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """``(scale_log2, softcap_inner)``: base-2 scores are ``scale_log2 * f(q @ k)`` with f the identity or
    ``tanh(softcap_inner * .)``.

    The kernels take scale_log2 out of the maximum, so it must be positive: the sign of a negative scale goes to q, and
    0 becomes too small to matter.
    """
    if softcap is not None:
        return softcap * LOG2_E, scale / softcap
    return max(abs(scale) * LOG2_E, 1e-30), None


def backward_scales(scale: float, softcap: float | None) -> dict[str, float | None]:
    """``scale_log2`` and ``softcap_inner`` as in `score_scales`, but of any sign; and ``scale``, for the derivative."""
    softcap_inner = None if softcap is None else scale / softcap
    return {
        "scale": scale, "scale_log2": (scale if softcap is None else softcap) * LOG2_E, "softcap_inner": softcap_inner,
    }  # fmt: skip
