"""The attentions of a model that take a prefix of their own, and the store of one of them.

A decoder-only model has one part, ``decoder``. An encoder-decoder model has three: the decoder's self-attention, the
encoder's self-attention, and the decoder's attention to the encoder's output (``cross``). All parts share the tasks'
ids; lengths and layers are each part's own.

Per layer a part holds two tensors ``[kv_heads, capacity, width]`` on the layer's device; task t owns tokens ``starts[t]
.. starts[t] + lens[t] - 1`` of each, and all layers of a device share ``starts`` and ``lens``.
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
    key_values: KeyValues, geometries: Mapping[str, Geometry], dtype: torch.dtype,
    devices: Mapping[str, Sequence[torch.device]], what: str,
) -> dict[str, list[LayerKV]]:  # fmt: skip
    """A prefix as a bank keeps it: every part of the model, in the bank's dtype and on each layer's device.

    Parts it does not name get length 0.

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
        layers = geometry.checked(named.get(part, geometry.empty()), name)
        parts[part] = [
            (k.detach().to(device, dtype), v.detach().to(device, dtype))
            for (k, v), device in zip(layers, devices[part], strict=True)
        ]
        checks = [_finite(k) & _finite(v) for k, v in parts[part]]
        finite = torch.stack([check.to(checks[0].device) for check in checks]).tolist()
        if not all(finite):
            i = finite.index(False)
            raise IncompatiblePrefix(
                f"{name}[{i}]: expected finite values in {dtype}, got NaN or infinity in layer {i}"
            )
    return parts


def _finite(x: Tensor) -> Tensor:
    """Whether all elements are; by the extremes, in a sixth of the time of `torch.isfinite` for each."""
    return torch.stack(x.aminmax()).isfinite().all() if x.numel() else x.new_ones((), dtype=torch.bool)


class Reserve(NamedTuple):
    """Room that is all a bank ever takes: ids ever given, and tokens, of which each prefix takes a multiple of 16."""

    tasks: int
    tokens: int


class SpanTable(NamedTuple):
    """By id, on one device: int32 ``[tasks]`` each."""

    lens: Tensor
    starts: Tensor


class Part:
    """The packed, ragged prefixes of all tasks in one part; the bank's `add` and `remove` keep the parts in step.

    With a reserve every tensor stays where it is and shows every change.
    """

    def __init__(
        self, geometry: Geometry, dtype: torch.dtype, devices: Sequence[torch.device], home: torch.device, shard: Shard,
        capacity: int = 0, reserve: Reserve | None = None,
    ) -> None:  # fmt: skip
        self.geometry = shard.local(geometry)
        self._devices, self._home, self._shard, self._reserve = devices, home, shard, reserve
        if reserve is not None:
            capacity = align(reserve.tokens)
        self._storage = Storage(self.geometry, dtype, devices, capacity, fixed=reserve is not None)
        self._spans: list[Span | None] = []  # by id; None was removed
        self._tables = self._new_tables()
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
        return self._layers[i]

    def _lend(self, longest: int | None) -> list[PrefixKV]:
        tables = (self._tables[device] for device in self._devices)
        return [
            PrefixKV(k, v, table.starts, table.lens, longest)
            for (k, v), table in zip(self._storage.lend(), tables, strict=True)
        ]

    def _tabulate(self) -> None:
        """Write the span tables anew: to new tensors, so that a `PrefixKV` that was handed out stays what it is, or,
        with a reserve, in place."""
        self.lengths = [-1 if span is None else span.length for span in self._spans]
        tables = self._new_tables()
        if self._reserve is None:
            self._tables = tables
            self._layers = self._lend(max(self.lengths, default=0))
            return
        for device, table in tables.items():
            self._tables[device].lens.copy_(table.lens)
            self._tables[device].starts.copy_(table.starts)
        self._layers = self._lend(None)  # without the longest prefix, on which what is captured must not depend

    def _new_tables(self) -> dict[torch.device, SpanTable]:
        """Lengths and starts on every device; ids that are reserved but not given are like removed ones."""
        free = 0 if self._reserve is None else self._reserve.tasks - len(self._spans)
        spans = [*self._spans, *[None] * free]
        lens = [-1 if span is None else span.length for span in spans]
        starts = [0 if span is None else span.start for span in spans]
        with torch.inference_mode(False):
            return {
                device: SpanTable(*(torch.tensor(x, dtype=torch.int32, device=device) for x in (lens, starts)))
                for device in dict.fromkeys((self._home, *self._devices))
            }

    @property
    def lens(self) -> dict[torch.device, Tensor]:
        """int32 ``[tasks]`` on every device, by id; -1 for a removed task.

        Each change makes new ones; with a reserve they are written in place, with an entry for every id there can be.
        """
        return {device: table.lens for device, table in self._tables.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor, tables included."""
        return self._storage.nbytes + sum(table.lens.nbytes + table.starts.nbytes for table in self._tables.values())
