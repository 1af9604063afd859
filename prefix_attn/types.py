"""The values that flow through the package: one layer's prefixes, and one attention call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from prefix_attn.errors import DTypeError, ShapeError
from prefix_attn.kernels.launch import Operands
from prefix_attn.plan import BatchPlan, RowTiles
from prefix_attn.transforms import requires_grad, transformed

#: Every prefix starts at a multiple of this many tokens, so that kernels may load it in wide, pipelined pieces.
ALIGNMENT = 16


def align(tokens: int) -> int:
    """Round ``tokens`` up to the next multiple of `ALIGNMENT`."""
    return -(-tokens // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, eq=False)
class PrefixKV:
    """One layer's prefixes of all tasks, packed along the token axis.

    Attributes:
        k, v: ``[kv_heads, tokens, head_dim]``; the prefix of task ``t`` is ``k[:, starts[t] : starts[t] + lens[t]]``.
            Tokens outside every task's span are never read; spans must not overlap, or gradients would be wrong.
        starts: int32 ``[tasks]``; multiples of `ALIGNMENT`.
        lens: int32 ``[tasks]``; 0 is an empty prefix, -1 a task that was removed (its id is an error).
        max_len: tokens of the longest prefix, if the host knows. It only helps to choose the faster way.

    Raises:
        ShapeError, DTypeError: two tensors disagree. (Spans outside the tokens are found where the host reads them, at
            `spans`; kernels on an accelerator trust them.)
    """

    k: Tensor
    v: Tensor
    starts: Tensor
    lens: Tensor
    max_len: int | None = None
    _spans: tuple[tuple[int, int], list[tuple[int, int]]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        shape, tasks = self.k.shape, self.lens.shape
        if len(shape) != 3 or self.v.shape != shape:
            raise ShapeError(
                "prefix.k, prefix.v: expected [kv_heads, tokens, head_dim] twice, got "
                f"{list(shape)} and {list(self.v.shape)}"
            )
        if len(tasks) != 1 or self.starts.shape != tasks:
            raise ShapeError(
                f"prefix.starts, prefix.lens: expected [tasks] twice, got {list(self.starts.shape)} and {list(tasks)}"
            )
        device = self.k.device
        for name, x in (("starts", self.starts), ("lens", self.lens)):
            if x.dtype != torch.int32 or x.device != device:
                raise DTypeError(
                    f"prefix.{name}: expected {torch.int32} on {device} like prefix.k, got {x.dtype} on {x.device}"
                )

    @classmethod
    def pack(cls, prefixes: Sequence[tuple[Tensor, Tensor]]) -> PrefixKV:
        """Pack ``(k, v)`` pairs, each ``[kv_heads, m_t, head_dim]``; ``m_t`` may differ and be 0.

        Raises:
            ShapeError: no prefix is given, or kv_heads or head_dim differ between prefixes.
            DTypeError: dtypes or devices differ between prefixes.
        """
        if not prefixes:
            raise ShapeError("prefixes: expected at least one (k, v) pair, got none; an empty prefix has m = 0 tokens")
        first = prefixes[0][0]
        for i, (k, v) in enumerate(prefixes):
            if k.ndim != 3 or k.shape != v.shape or (k.shape[0], k.shape[2]) != (first.shape[0], first.shape[2]):
                raise ShapeError(
                    f"prefixes[{i}]: expected k and v of shape [kv_heads, m, head_dim] with kv_heads and head_dim of "
                    f"prefixes[0] ({list(first.shape)}), got k {list(k.shape)} and v {list(v.shape)}"
                )
            if k.dtype != first.dtype or v.dtype != first.dtype or k.device != first.device or v.device != first.device:
                raise DTypeError(
                    f"prefixes[{i}]: expected {first.dtype} on {first.device} like prefixes[0].k, got "
                    f"k {k.dtype} on {k.device}, v {v.dtype} on {v.device}"
                )
        lens = [k.shape[1] for k, _ in prefixes]
        *starts, _ = accumulate(map(align, lens), initial=0)
        pad = [first.new_zeros(first.shape[0], align(m) - m, first.shape[2]) for m in lens]
        return cls(
            k=torch.cat([t for (k, _), z in zip(prefixes, pad, strict=True) for t in (k, z)], dim=1),
            v=torch.cat([t for (_, v), z in zip(prefixes, pad, strict=True) for t in (v, z)], dim=1),
            starts=torch.tensor(starts, dtype=torch.int32, device=first.device),
            lens=torch.tensor(lens, dtype=torch.int32, device=first.device),
            max_len=max(lens),
        )

    def __repr__(self) -> str:
        heads, tokens, dim = self.k.shape
        kind = str(self.k.dtype).removeprefix("torch.")
        held = f"{self.num_tasks} task ids, {tokens} tokens, {heads} kv heads of {dim}"
        return f"PrefixKV({held}, {kind} on {self.k.device})"

    @property
    def kv_heads(self) -> int:
        return self.k.shape[0]

    @property
    def head_dim(self) -> int:
        return self.k.shape[2]

    @property
    def num_tasks(self) -> int:
        return self.lens.shape[0]

    @property
    def expected_max_len(self) -> int:
        """`max_len`, or what the shapes suggest: the mean."""
        return self.k.shape[1] // max(1, self.num_tasks) if self.max_len is None else self.max_len

    @property
    def spans(self) -> list[tuple[int, int]]:
        """``(start, length)`` of each task on the host; synchronises with the device where the tables have changed.

        Raises:
            ShapeError: a task's tokens lie outside those there are, or begin at no multiple of `ALIGNMENT`.
        """
        # A tensor made in the inference mode does not count its changes: it is read anew each time.
        counted = not (self.starts.is_inference() or self.lens.is_inference())
        versions = (self.starts._version, self.lens._version) if counted else None
        if self._spans is not None and self._spans[0] == versions:
            return self._spans[1]
        spans, tokens = list(zip(self.starts.tolist(), self.lens.tolist(), strict=True)), self.k.shape[1]
        for task, (start, m) in enumerate(spans):
            if m > 0 and (start < 0 or start % ALIGNMENT or start + m > tokens):
                raise ShapeError(
                    f"prefix.starts[{task}], prefix.lens[{task}]: expected a start that is a multiple of {ALIGNMENT}, "
                    f"and an end among the {tokens} tokens, got {start} and {m}"
                )
        live = sorted((start, start + m, task) for task, (start, m) in enumerate(spans) if m > 0)
        for (_, end, task), (start, _, other) in pairwise(live):
            if start < end:
                raise ShapeError(
                    "prefix.starts, prefix.lens: expected spans that do not overlap, got those of tasks "
                    f"{task} and {other}"
                )
        if versions is not None:
            object.__setattr__(self, "_spans", (versions, spans))
        return spans

    def __getstate__(self) -> dict[str, object]:
        """A copy's tensors count their changes from the start."""
        return vars(self) | {"_spans": None}


@dataclass(eq=False, kw_only=True)
class AttentionCall(Operands):
    """One checked call of `prefix_attention`; what every backend receives. Shapes as documented there.

    Never changed, but for ``tiles``, which the operator sets.
    """

    prefix: PrefixKV
    return_lse: bool
    batch_invariant: bool
    plan: BatchPlan | None = None  # who shares with whom; without one, a regime that must know makes it
    tiles: RowTiles | None = None  # the plan's, for the regime chosen; only inside the operator

    @property
    def lse_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def row(self, b: int) -> AttentionCall:
        """Row ``b`` as a batch of one; own keys that it may not read are cut off, unless distances count them."""
        start = int(self.kv_start[b]) if self.kv_start is not None else 0
        end = int(self.kv_len[b]) if self.kv_len is not None else self.kv_capacity
        start, one = min(start, end), slice(b, b + 1)
        last = end if self.causal or self.relative_bias is None else self.kv_capacity
        return replace(
            self, q=self.q[one].contiguous(),
            k=self.k[one, :, :last].contiguous(), v=self.v[one, :, :last].contiguous(),
            task_ids=self.task_ids[one], kv_start=self.task_ids.new_tensor([start]),
            kv_len=self.task_ids.new_tensor([end]), plan=None,
        )  # fmt: skip

    @property
    def needs_grad(self) -> bool:
        """Whether autograd must see this call."""
        if not torch.is_grad_enabled():
            return False
        tensors = (self.q, self.k, self.v, self.prefix.k, self.prefix.v, self.sinks, self.relative_bias)
        if any(t is not None and t.requires_grad for t in tensors):
            return True
        return transformed() and any(t is not None and requires_grad(t) for t in tensors)


T = TypeVar("T")


class PerInput(NamedTuple, Generic[T]):
    """One value for each tensor of a call that can have a gradient: the gradient, or whether it is wanted."""

    q: T
    k: T
    v: T
    prefix_k: T
    prefix_v: T
    sinks: T
    relative_bias: T


Gradients = PerInput[Tensor | None]  # in the shapes of the inputs; None where none was wanted
