"""From tensors to kernel arguments: strides, alignment, the scale in base 2. What every attention kernel shares."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from prefix_attn.kernels.config import TileConfig, config_for

LOG2_E = math.log2(math.e)

#: Triton fuses multiply-adds by default up to 3.9, and not from 3.10 on: set here, so that bits do not depend on it.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

#: For how many layouts a kernel keeps its launches: those of a model's layers, over the last steps.
LAYOUTS = 64


@dataclass(frozen=True, eq=False)
class Layout:
    """A call without its tensors: all that its launch follows from, and the same in every layer of a step.

    Calls that are alike share one layout object (`Operands.layout`), so layouts are compared by identity, and what was
    computed from one is kept. Growing own keys make a new layout every step, for which the first layer computes it.
    """

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    prefix_tokens: int
    num_tasks: int
    strides: tuple[tuple[int, ...], ...]  # of q, k, v, prefix.k and prefix.v
    row_strides: tuple[int, ...]  # of task_ids, kv_start and kv_len; 0 for one that is not given
    bias: tuple[int, ...] | None  # strides and entries per head of relative_bias
    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    dtype: torch.dtype
    device: torch.device
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False)  # what else follows, for its users

    @property
    def group(self) -> int:
        return self.q_shape[1] // self.k_shape[1]

    def config(self, kernel: str, rows: int = 0) -> TileConfig:
        """The default config of a kernel; rows as in `config_for`."""
        kind = kernel if self.bias is None else f"biased_{kernel}"
        return config_for(kind, self.q_shape[3], self.dtype, self.device, rows)

    def arguments(self, **strides: tuple[int, ...]) -> dict[str, Any]:
        """The keyword arguments of an attention kernel that follow from the layout, and from ``strides`` of outputs."""
        q, k, v, prefix_k, prefix_v = self.strides
        scale_log2, softcap_inner = score_scales(self.scale, self.softcap)
        return {
            **stride_arguments({"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v, **strides}),
            "scale_log2": scale_log2, "softcap_inner": softcap_inner, **self.row_arguments(),
        }  # fmt: skip

    def row_arguments(self) -> dict[str, Any]:
        """Those that say which keys each query sees, the sizes, and how a relative bias lies, if there is one."""
        (_, _, q_len, head_dim), (_, kv_heads, kv_capacity, _) = self.q_shape, self.k_shape
        stride_task_ids, stride_kv_start, stride_kv_len = self.row_strides
        stride_bias_head, stride_bias_entry, bias_entries = self.bias or (0, 0, 0)
        return {
            "stride_task_ids": stride_task_ids, "stride_kv_start": stride_kv_start, "stride_kv_len": stride_kv_len,
            "kv_heads": kv_heads, "q_len": q_len, "kv_capacity": kv_capacity, "num_tasks": self.num_tasks,
            "window": self.window, "GROUP": self.group, "HEAD_DIM": head_dim,
            # The one query of a row sees all its keys up to its end.
            "CAUSAL": self.causal and q_len > 1,
            "stride_bias_head": stride_bias_head, "stride_bias_entry": stride_bias_entry,
            "bias_reach": bias_entries // 2, "bias_scale": bias_scale(self.scale, self.softcap),
            "BIAS_OF_SLOTS": not self.causal,
        }  # fmt: skip


kept_layout = lru_cache(maxsize=LAYOUTS)(Layout)


class Prefixes(Protocol):
    """Prefixes of all tasks, packed along the token axis: `prefix_attn.types.PrefixKV`.

    k, v: ``[kv_heads, tokens, head_dim]``; starts, lens: int32 ``[tasks]``.
    """

    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def starts(self) -> Tensor: ...
    @property
    def lens(self) -> Tensor: ...


@dataclass(eq=False)
class Operands:
    """What an attention kernel is given; `prefix_attn.types.AttentionCall` is one, and says more.

    Attributes:
        q: ``[batch, q_heads, q_len, head_dim]``; any strides, as all tensors but those of prefix.
        k, v: ``[batch, kv_heads, kv_len, head_dim]``.
        task_ids: int32 ``[batch]``; -1 for a row without prefix.
        kv_start, kv_len: int32 ``[batch]``; None is 0, and ``k.shape[2]``.
        sinks: ``[q_heads]``.
        relative_bias: ``[q_heads, 2R + 1]``.

    (Not frozen: to make one would take four times as long, and each layer of a step does.)
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix: Prefixes
    task_ids: Tensor
    kv_start: Tensor | None
    kv_len: Tensor | None
    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None = None
    relative_bias: Tensor | None = None
    _layout: Layout | None = field(default=None, init=False, repr=False)

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def q_heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def q_len(self) -> int:
        return self.q.shape[2]

    @property
    def kv_capacity(self) -> int:
        """Key slots that exist; ``kv_len`` says how many of them hold a key."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def scaled(self) -> Self:
        """With the sign of a negative scale in q, where the forward kernels need it; see `score_scales`."""
        signed = self.scale < 0 and self.softcap is None
        return replace(self, q=-self.q, scale=-self.scale) if signed else self

    @property
    def layout(self) -> Layout:
        """The one layout of all calls like this."""
        if self._layout is not None:
            return self._layout
        # Every layer of a step comes here: no loops, and each tensor is asked for its strides once.
        q, k, prefix, prefix_k, table = self.q, self.k, self.prefix, self.prefix.k, self.relative_bias
        kv_start, kv_len, of_rows = self.kv_start, self.kv_len, (0,)
        (of_ids,) = self.task_ids.stride()
        (of_start,) = of_rows if kv_start is None else kv_start.stride()
        (of_len,) = of_rows if kv_len is None else kv_len.stride()
        self._layout = layout = kept_layout(
            q.shape, k.shape, prefix_k.shape[1], prefix.lens.shape[0],
            (q.stride(), k.stride(), self.v.stride(), prefix_k.stride(), prefix.v.stride()), (of_ids, of_start, of_len),
            None if table is None else (*table.stride(), table.shape[1]),
            self.causal, self.scale, self.window, self.softcap, q.dtype, q.device,
        )  # fmt: skip
        return layout

    def tensors(self) -> dict[str, Tensor | None]:
        """The keyword arguments of an attention kernel that are inputs, but for sinks and a relative bias."""
        prefix = self.prefix
        return {
            "q_ptr": self.q, "k_ptr": self.k, "v_ptr": self.v, "prefix_k_ptr": prefix.k, "prefix_v_ptr": prefix.v,
            **self.row_tensors(),
        }  # fmt: skip

    def row_tensors(self) -> dict[str, Tensor | None]:
        """Those that say which keys each row sees."""
        starts, lens = self.prefix.starts.contiguous(), self.prefix.lens.contiguous()
        return {
            "task_ids_ptr": self.task_ids, "starts_ptr": starts, "lens_ptr": lens,
            "kv_start_ptr": self.kv_start, "kv_len_ptr": self.kv_len,
        }  # fmt: skip

    def row_arguments(self) -> dict[str, Any]:
        """`row_tensors`, the relative bias, and all that `Layout.row_arguments` says."""
        return {**self.row_tensors(), "bias_ptr": self.relative_bias, **self.layout.row_arguments()}


def contiguous(x: Tensor | None) -> Tensor | None:
    """Sinks as a kernel takes them."""
    return None if x is None else x.contiguous()


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
