"""The attentions of a model that take a prefix of their own, and the store of one of them.

A decoder-only model has one part, ``decoder``. An encoder-decoder model has three: the decoder's self-attention, the
encoder's self-attention, and the decoder's attention to the encoder's output (``cross``). All parts share the tasks'
ids; lengths and layers are each part's own.

Per layer a part holds two tensors ``[kv_heads, capacity, width]``; task t owns tokens ``starts[t] .. starts[t] +
lens[t] - 1`` of each, and all layers share ``starts`` and ``lens``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.bank.geometry import DECODER, Geometry, LayerKV
from prefix_attn.bank.shard import Shard
from prefix_attn.bank.storage import Span, Storage
from prefix_attn.errors import IncompatiblePrefix, ShapeError
from prefix_attn.types import PrefixKV, align

#: A prefix: for each part a list over its layers, or, as a plain list, that of the decoder alone. None for a layer that
#: keeps no keys.
KeyValues = Sequence[LayerKV | None] | Mapping[str, Sequence[LayerKV | None]]


def prepared_parts(
    key_values: KeyValues, geometries: Mapping[str, Geometry], dtype: torch.dtype, device: torch.device, what: str
) -> dict[str, list[LayerKV]]:
    """A prefix as a bank keeps it: every part of the model, in the bank's dtype; parts it does not name get length 0.

    Raises:
        IncompatiblePrefix: a part that the model does not have, or layers, shapes or values (not finite) that do not
            fit; ``what`` names the prefix in errors.
    """
    named: Mapping[str, Sequence[LayerKV | None]] = (
        key_values if isinstance(key_values, Mapping) else {DECODER: key_values}
    )
    if unknown := sorted(set(named) - set(geometries)):
        raise IncompatiblePrefix(f"{what}: expected parts among {list(geometries)}, got {unknown}")
    parts = {}
    for part, geometry in geometries.items():
        name = f"{what}[{part!r}]" if isinstance(key_values, Mapping) and len(geometries) > 1 else what
        layers = geometry.filled(named.get(part, geometry.empty()))
        geometry.check(layers, name)
        parts[part] = [(k.detach().to(device, dtype), v.detach().to(device, dtype)) for k, v in layers]
        finite = torch.stack([k.isfinite().all() & v.isfinite().all() for k, v in parts[part]]).tolist()
        if not all(finite):
            i = finite.index(False)
            raise IncompatiblePrefix(
                f"{name}[{i}]: expected finite values in {dtype}, got NaN or infinity in layer {i}"
            )
    return parts


class Reserve(NamedTuple):
    """Room that is all a bank ever takes: ids ever given, and tokens, of which each prefix takes a multiple of 16."""

    tasks: int
    tokens: int


class Part:
    """The packed, ragged prefixes of all tasks in one part; the bank's `add` and `remove` keep the parts in step.

    With a reserve every tensor stays where it is and shows every change.
    """

    def __init__(
        self, geometry: Geometry, dtype: torch.dtype, device: torch.device, shard: Shard, capacity: int = 0,
        reserve: Reserve | None = None,
    ) -> None:  # fmt: skip
        self.geometry = shard.local(geometry)
        self._device, self._shard, self._reserve = device, shard, reserve
        if reserve is not None:
            capacity = align(reserve.tokens)
        self._storage = Storage(self.geometry, dtype, device, capacity, fixed=reserve is not None)
        self._spans: list[Span | None] = []  # by id; None was removed
        self._layers: list[PrefixKV] = []
        self._lens, self._starts = self._tables()
        self._tabulate()

    def append(self, key_values: Sequence[LayerKV]) -> None:
        """Store the prefix of the next id: k, v ``[kv_heads, m, head_dim]`` of every layer, in the bank's dtype.

        Of a tensor-parallel model these are all heads, and this process's are stored.

        Raises:
            ShapeError: the reserve is used up.
        """
        if self._reserve is not None and len(self._spans) == self._reserve.tasks:
            raise ShapeError(
                f"reserve: expected at most {self._reserve.tasks} tasks, removed ones included, got one more; make a "
                "bank that reserves more"
            )
        mine = [(self._shard.heads(k), self._shard.heads(v)) for k, v in key_values]
        self._spans.append(self._storage.put(mine, mine[0][0].shape[1]))
        self._tabulate()

    def undo_append(self) -> None:
        """Forget the last id, as if it had never been given."""
        span = self._spans.pop()
        assert span is not None
        self._storage.free(span)
        self._tabulate()

    def remove(self, task: int) -> None:
        """Free a task's space; its id stays taken."""
        span = self._spans[task]
        assert span is not None
        self._storage.free(span)
        self._spans[task] = None
        self._tabulate()

    def read(self, task: int) -> list[LayerKV]:
        """Views of a task's keys and values, by layer."""
        span = self._spans[task]
        assert span is not None
        return self._storage.read(span)

    def layer(self, i: int) -> PrefixKV:
        """Layer i's prefixes, sharing memory: a snapshot, so ask again after a change; with a reserve, never stale."""
        if not self._layers:
            self._layers = self._lend(max(self.lengths, default=0))
        return self._layers[i]

    def _lend(self, longest: int | None) -> list[PrefixKV]:
        return [PrefixKV(k, v, self._starts, self._lens, longest) for k, v in self._storage.lend()]

    def _tabulate(self) -> None:
        """Write the span tables anew: to new tensors, so that a `PrefixKV` that was handed out stays what it is, or,
        with a reserve, in place."""
        self.lengths = [-1 if span is None else span.length for span in self._spans]
        lens, starts = self._tables()
        if self._reserve is None:
            self._lens, self._starts, self._layers = lens, starts, []
            return
        self._lens.copy_(lens)
        self._starts.copy_(starts)
        self._layers = self._lend(None)  # without the longest prefix, on which what is captured must not depend

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Lengths and starts by id; ids that are reserved but not given are like removed ones."""
        free = 0 if self._reserve is None else self._reserve.tasks - len(self._spans)
        spans = [*self._spans, *[None] * free]
        lens = [-1 if span is None else span.length for span in spans]
        starts = [0 if span is None else span.start for span in spans]
        with torch.inference_mode(False):
            lens_table, starts_table = (torch.tensor(x, dtype=torch.int32, device=self._device) for x in (lens, starts))
        return lens_table, starts_table

    @property
    def lens(self) -> Tensor:
        """int32 ``[tasks]`` on the device, by id; -1 for a removed task.

        Each change makes a new one; with a reserve it is written in place, and has an entry for every id there can be.
        """
        return self._lens

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor, tables included."""
        return self._storage.nbytes + self._starts.nbytes + self._lens.nbytes
