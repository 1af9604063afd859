"""The attentions of a model that take a prefix of their own, and the store of one of them.

A decoder-only model has one part, ``decoder``. An encoder-decoder model has three: the decoder's self-attention, the
encoder's self-attention, and the decoder's attention to the encoder's output (``cross``). All parts share the tasks'
ids; lengths and layers are each part's own.

Per layer a part holds two tensors ``[kv_heads, capacity, head_dim]``; task t owns tokens ``starts[t] .. starts[t] +
lens[t] - 1`` of each, and all layers share ``starts`` and ``lens``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prefix_attn.bank.geometry import DECODER, Geometry, LayerKV
from prefix_attn.bank.shard import Shard
from prefix_attn.bank.storage import Span, Storage
from prefix_attn.errors import IncompatiblePrefix
from prefix_attn.types import PrefixKV

#: A prefix: for each part a list over its layers, or, as a plain list, that of the decoder alone.
KeyValues = Sequence[LayerKV] | Mapping[str, Sequence[LayerKV]]


def prepared_parts(
    key_values: KeyValues, geometries: Mapping[str, Geometry], dtype: torch.dtype, device: torch.device, what: str
) -> dict[str, list[LayerKV]]:
    """A prefix as a bank keeps it: every part of the model, in the bank's dtype; parts it does not name get length 0.

    Raises:
        IncompatiblePrefix: a part that the model does not have, or layers, shapes or values (not finite) that do not
            fit; ``what`` names the prefix in errors.
    """
    named: Mapping[str, Sequence[LayerKV]] = key_values if isinstance(key_values, Mapping) else {DECODER: key_values}
    if unknown := sorted(set(named) - set(geometries)):
        raise IncompatiblePrefix(f"{what}: expected parts among {list(geometries)}, got {unknown}")
    parts = {}
    for part, geometry in geometries.items():
        name = f"{what}[{part!r}]" if isinstance(key_values, Mapping) and len(geometries) > 1 else what
        layers = named.get(part, geometry.empty())
        geometry.check(layers, name)
        parts[part] = [(k.detach().to(device, dtype), v.detach().to(device, dtype)) for k, v in layers]
        finite = torch.stack([k.isfinite().all() & v.isfinite().all() for k, v in parts[part]]).tolist()
        if not all(finite):
            i = finite.index(False)
            raise IncompatiblePrefix(
                f"{name}[{i}]: expected finite values in {dtype}, got NaN or infinity in layer {i}"
            )
    return parts


class Part:
    """The packed, ragged prefixes of all tasks in one part; the bank's `add` and `remove` keep the parts in step."""

    def __init__(
        self, geometry: Geometry, dtype: torch.dtype, device: torch.device, shard: Shard, capacity: int = 0
    ) -> None:
        self.geometry = shard.local(geometry)
        self._device = device
        self._shard = shard
        self._storage = Storage(self.geometry, dtype, device, capacity)
        self._spans: list[Span | None] = []  # by id; None was removed
        self._layers: list[PrefixKV] = []
        self._tabulate()

    def append(self, key_values: Sequence[LayerKV]) -> None:
        """Store the prefix of the next id: k, v ``[kv_heads, m, head_dim]`` of every layer, in the bank's dtype.

        Of a tensor-parallel model these are all heads, and this process's are stored.
        """
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
        """Layer i's prefixes, sharing memory: a snapshot, so ask again after a change."""
        if not self._layers:
            longest = max(self.lengths, default=0)
            self._layers = [PrefixKV(k, v, self._starts, self._lens, longest) for k, v in self._storage.lend()]
        return self._layers[i]

    def _tabulate(self) -> None:
        """Make the span tables anew; those of a `PrefixKV` that was handed out stay as they are."""
        self.lengths = [-1 if span is None else span.length for span in self._spans]
        starts = [0 if span is None else span.start for span in self._spans]
        with torch.inference_mode(False):
            self._lens = torch.tensor(self.lengths, dtype=torch.int32, device=self._device)
            self._starts = torch.tensor(starts, dtype=torch.int32, device=self._device)
        self._layers = []

    @property
    def lens(self) -> Tensor:
        """int32 ``[tasks]`` on the device, by id; -1 for a removed task. Never written: each change makes a new one."""
        return self._lens

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor, tables included."""
        return self._storage.nbytes + self._starts.nbytes + self._lens.nbytes
