"""Memory of a bank: per layer two tensors ``[kv_heads, capacity, width]``, shared out in spans of whole tokens.

Each layer's are on that layer's device; the spans are the same everywhere.

A span never moves inside its memory, and memory is not written where a borrower may look: the space of a removed span
waits (is pinned) until the live spans are copied to new memory, which nobody has borrowed yet.

Fixed memory is the opposite: it is never replaced, and written where borrowers look, for they want to see every change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.bank.geometry import Geometry, LayerKV
from prefix_attn.errors import ShapeError
from prefix_attn.types import align


class Span(NamedTuple):
    """Tokens ``start .. start + length - 1`` of every layer; start is a multiple of ALIGNMENT."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """One past the last token that belongs to the span, padding included."""
        return self.start + align(self.length)


class Storage:
    """Keys and values of every layer; zero where nothing was written."""

    def __init__(
        self, geometry: Geometry, dtype: torch.dtype, devices: Sequence[torch.device], capacity: int, fixed: bool
    ) -> None:
        self._geometry, self._dtype, self._devices, self._fixed = geometry, dtype, devices, fixed
        self._spans: list[Span] = []
        self._new_memory(capacity)

    def _new_memory(self, capacity: int) -> None:
        shapes = [(layer.kv_heads, capacity, layer.width) for layer in self._geometry.layers]
        places = list(zip(shapes, self._devices, strict=True))
        with torch.inference_mode(False):  # memory made in inference mode could not be written outside it
            k = [torch.zeros(shape, dtype=self._dtype, device=device) for shape, device in places]
            v = [torch.zeros(shape, dtype=self._dtype, device=device) for shape, device in places]
        for span in self._spans:
            _write(k, v, span, self.read(span))
        self._capacity, self._k, self._v = capacity, k, v
        self._pinned: list[Span] = []  # of removed spans that a borrower may still see

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self._k, *self._v))

    def put(self, key_values: Sequence[LayerKV], tokens: int) -> Span:
        """Copy k, v ``[kv_heads, tokens, head_dim]`` of every layer to a free span; grow where there is none.

        Raises:
            ShapeError: fixed memory has no gap that is long enough.
        """
        start = _first_gap([*self._spans, *self._pinned], tokens)
        if start + align(tokens) > self._capacity:
            if self._fixed:
                raise ShapeError(
                    f"reserve: expected a free stretch of {align(tokens)} tokens for a prefix of {tokens}, got none "
                    f"among the {self._capacity} reserved; remove a task, or make a bank that reserves more"
                )
            start = _first_gap(self._spans, tokens)
            end = start + align(tokens)
            self._new_memory(self._capacity if end <= self._capacity else max(end, align(self._capacity * 3 // 2)))
        span = Span(start, tokens)
        _write(self._k, self._v, span, key_values)
        self._spans.append(span)
        return span

    def free(self, span: Span) -> None:
        """Give a span back."""
        self._spans.remove(span)
        if not self._fixed:
            self._pinned.append(span)

    def read(self, span: Span) -> list[LayerKV]:
        """Views of the span's keys and values."""
        tokens = slice(span.start, span.start + span.length)
        layers = zip(self._k, self._v, self._geometry.layers, strict=True)
        return [(k[:, tokens, : kind.head_dim], v[:, tokens, : kind.v_head_dim]) for k, v, kind in layers]

    def lend(self) -> list[LayerKV]:
        """The tensors of every layer, ``[kv_heads, capacity, width]``; from now on somebody may look at all spans."""
        return list(zip(self._k, self._v, strict=True))


def _write(ks: list[Tensor], vs: list[Tensor], span: Span, key_values: Sequence[LayerKV]) -> None:
    tokens = slice(span.start, span.start + span.length)
    for to_k, to_v, (k, v) in zip(ks, vs, key_values, strict=True):
        to_k[:, tokens, : k.shape[2]] = k
        to_v[:, tokens, : v.shape[2]] = v


def _first_gap(taken: Iterable[Span], tokens: int) -> int:
    """Where ``tokens`` fit between or behind the ``taken`` spans; may lie past the capacity."""
    start = 0
    for span in sorted(taken):
        if span.length and span.start - start >= align(tokens):
            break
        start = max(start, span.end)
    return start
