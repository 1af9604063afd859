"""From tensors to kernel arguments: strides, alignment, the scale in base 2. What every attention kernel shares."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefix_attn.kernels.config import TileConfig, config_for

LOG2_E = math.log2(math.e)

#: Multiply-add fusion is Triton's default up to 3.9 and no longer from 3.10: said, so that bits do not depend on it.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

#: Layouts whose launches a kernel keeps: those of a model's layers, over the last steps.
LAYOUTS = 64

#: The tensors whose strides are arguments of an attention kernel.
STRIDED = ("q", "k", "v", "prefix_k", "prefix_v", "out")


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. (Triton's own, which kernels may call too, takes the host microseconds.)"""
    return -(-a // b)


class Layout(NamedTuple):
    """A call without its tensors: all that its launch follows from, and the same in every layer of a step.

    What is worked out from it is therefore kept (``lru_cache`` of `LAYOUTS` entries): own keys that grow make a new
    layout every step, and the first layer of the step finds the launch anew.
    """

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    prefix_tokens: int
    num_tasks: int
    strides: tuple[tuple[int, ...], ...]  # of `STRIDED`, up to the last that the kernel takes
    row_strides: tuple[int, ...]  # of task_ids, kv_start and kv_len; 0 for one that is not given
    bias: tuple[int, ...] | None  # strides and entries per head of relative_bias
    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        return self.q_shape[1] // self.k_shape[1]

    def config(self, kernel: str, rows: int = 0) -> TileConfig:
        """The default config of a kernel; rows as in `config_for`."""
        kind = kernel if self.bias is None else f"biased_{kernel}"
        return config_for(kind, self.q_shape[3], self.dtype, self.device, rows)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of an attention kernel that follow from the layout."""
        scale_log2, softcap_inner = score_scales(self.scale, self.softcap)
        return {
            **stride_arguments(dict(zip(STRIDED, self.strides, strict=False))),
            "scale_log2": scale_log2, "softcap_inner": softcap_inner, **self.row_arguments(),
        }  # fmt: skip

    def bias_arguments(self) -> dict[str, Any]:
        """Those of a kernel that adds a relative bias, or none."""
        stride_head, stride_entry, entries = self.bias or (0, 0, 0)
        return {
            "stride_bias_head": stride_head, "stride_bias_entry": stride_entry, "bias_reach": entries // 2,
            "bias_scale": bias_scale(self.scale, self.softcap), "BIAS_OF_SLOTS": not self.causal,
        }  # fmt: skip

    def row_arguments(self) -> dict[str, Any]:
        """Those that say which keys each query sees, and the sizes."""
        (_, _, q_len, head_dim), (_, kv_heads, kv_capacity, _) = self.q_shape, self.k_shape
        stride_task_ids, stride_kv_start, stride_kv_len = self.row_strides
        return {
            "stride_task_ids": stride_task_ids, "stride_kv_start": stride_kv_start, "stride_kv_len": stride_kv_len,
            "kv_heads": kv_heads, "q_len": q_len, "kv_capacity": kv_capacity, "num_tasks": self.num_tasks,
            "window": self.window, "GROUP": self.group, "HEAD_DIM": head_dim,
            # The one query of a row sees all its keys up to its end.
            "CAUSAL": self.causal and q_len > 1,
        }  # fmt: skip


class Operands(NamedTuple):
    """The inputs of one attention call, as in `prefix_attn.types.AttentionCall`.

    q: ``[batch, q_heads, q_len, head_dim]``; k, v: ``[batch, kv_heads, kv_len, head_dim]``; prefix_k, prefix_v:
    ``[kv_heads, tokens, head_dim]``; starts, lens: int32 ``[tasks]``; task_ids, kv_start, kv_len: int32 ``[batch]``;
    sinks: ``[q_heads]``, contiguous; relative_bias: ``[q_heads, 2R + 1]``. Any strides but for sinks.
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
    def scaled(self) -> Operands:
        """With the sign of a negative scale in q, where the forward kernels need it; see `score_scales`."""
        return self if self.scale >= 0 or self.softcap is not None else self._replace(q=-self.q, scale=-self.scale)

    def layout(self, out: Tensor | None = None) -> Layout:
        """The layout of this call; with ``out``, if the kernel writes it by its strides."""
        # Every layer of a step comes here: no loops, and each tensor is asked for its strides once, all together.
        q, k, v, prefix_k, prefix_v, _, lens, ids, kv_start, kv_len, _, causal, scale, window, softcap, table = self
        strides: tuple[tuple[int, ...], ...]
        strides = q.stride(), k.stride(), v.stride(), prefix_k.stride(), prefix_v.stride()
        (of_ids,), of_rows = ids.stride(), (0,)
        (of_start,) = of_rows if kv_start is None else kv_start.stride()
        (of_len,) = of_rows if kv_len is None else kv_len.stride()
        return Layout(
            q.shape, k.shape, prefix_k.shape[1], lens.shape[0], strides if out is None else (*strides, out.stride()),
            (of_ids, of_start, of_len), None if table is None else (*table.stride(), table.shape[1]),
            causal, scale, window, softcap, q.dtype, q.device,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor | None]:
        """The keyword arguments of an attention kernel that are inputs, without sinks."""
        return {
            "q_ptr": self.q, "k_ptr": self.k, "v_ptr": self.v,
            "prefix_k_ptr": self.prefix_k, "prefix_v_ptr": self.prefix_v, **self.row_tensors(),
        }  # fmt: skip

    def row_tensors(self) -> dict[str, Tensor | None]:
        """Those that say which keys each row sees."""
        return {
            "task_ids_ptr": self.task_ids, "starts_ptr": self.starts.contiguous(), "lens_ptr": self.lens.contiguous(),
            "kv_start_ptr": self.kv_start, "kv_len_ptr": self.kv_len,
        }  # fmt: skip

    def row_arguments(self) -> dict[str, Any]:
        """Arguments that say which keys each query sees, and the sizes."""
        return {**self.row_tensors(), **self.layout().row_arguments()}

    def bias_arguments(self) -> dict[str, Any]:
        """Those of a relative bias, or of none."""
        return {"bias_ptr": self.relative_bias, **self.layout().bias_arguments()}


def strided(**tensors: Tensor) -> dict[str, Any]:
    """``x_ptr`` of tensors ``[(batch,) heads, seq, dim]``, and their `stride_arguments`."""
    pointers = {f"{name}_ptr": x for name, x in tensors.items()}
    return {**pointers, **stride_arguments({name: x.stride() for name, x in tensors.items()})}


def stride_arguments(strides: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """``stride_x_<axis>`` of tensors ``[(batch,) heads, seq, dim]``, and ALIGN.

    Strides are in units of ALIGN elements, but for those of dim: so the compiler sees how wide it may load, for one
    more variant per alignment only.
    """
    align = math.gcd(16, *(stride for of_x in strides.values() for stride in of_x[:-1]))
    arguments = {"ALIGN": align}
    for name, of_x in strides.items():
        outer = ("batch", "head", "seq")[4 - len(of_x) :]
        arguments |= {f"stride_{name}_{axis}": s // align for axis, s in zip(outer, of_x, strict=False)}
        arguments[f"stride_{name}_dim"] = of_x[-1]
    return arguments


def bias_scale(scale: float, softcap: float | None) -> float:
    """What a bias is multiplied by to be added to what `signed_scales` are applied to."""
    return LOG2_E / signed_scales(scale, None)[0] if softcap is None else 1 / softcap


def score_scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """``(scale_log2, softcap_inner)``: base-2 scores are ``scale_log2 * f(q @ k)`` with f the identity or
    ``tanh(softcap_inner * .)``.

    The kernels take scale_log2 out of the maximum, so it must be positive: the sign of a negative scale goes to q, and
    0 becomes too small to matter.
    """
    if softcap is not None:
        return softcap * LOG2_E, scale / softcap
    return max(abs(scale) * LOG2_E, 1e-30), None


def signed_scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """`score_scales` with the sign of the scale, for a q that has not taken it."""
    scale_log2, softcap_inner = score_scales(scale, softcap)
    return scale_log2 if softcap is not None else math.copysign(scale_log2, scale), softcap_inner


def backward_scales(scale: float, softcap: float | None) -> dict[str, float | None]:
    """`signed_scales`, and ``scale`` itself for the derivative."""
    scale_log2, softcap_inner = signed_scales(scale, softcap)
    return {"scale": scale, "scale_log2": scale_log2, "softcap_inner": softcap_inner}
