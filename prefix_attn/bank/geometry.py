"""The shape of a prefix: kv_heads and head_dim of every layer, which may differ from layer to layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.errors import IncompatiblePrefix

#: One layer's prefix: k ``[kv_heads, m, head_dim]`` and v ``[kv_heads, m, v_head_dim]``; the two dims mostly agree.
#: A layer that keeps no keys (a recurrent or convolutional one, or one that reads another's) has no heads.
LayerKV = tuple[Tensor, Tensor]

#: The attentions that take a prefix of their own (parts.py). A decoder-only model has the first alone.
DECODER, ENCODER, CROSS = "decoder", "encoder", "cross"


class LayerGeometry(NamedTuple):
    """What one layer keeps per token: ``kv_heads * (head_dim + v_head_dim)`` numbers; nothing where it has no heads."""

    kv_heads: int
    head_dim: int
    v_head_dim: int

    @property
    def width(self) -> int:
        """Head dim of the bank's memory, where the narrower of k and v is padded with zeros."""
        return max(self.head_dim, self.v_head_dim)

    def __str__(self) -> str:
        values = "" if self.head_dim == self.v_head_dim else f" and values of {self.v_head_dim}"
        return f"{self.kv_heads} kv heads of {self.head_dim}{values}"


@dataclass(frozen=True)
class Geometry:
    """The layers of a model, as far as a prefix is concerned."""

    layers: tuple[LayerGeometry, ...]

    @classmethod
    def of(cls, key_values: Sequence[LayerKV]) -> Geometry:
        """The geometry of keys ``[kv_heads, m, head_dim]`` and values ``[kv_heads, m, v_head_dim]``."""
        return cls(tuple(LayerGeometry(k.shape[0], k.shape[2], v.shape[2]) for k, v in key_values))

    @property
    def attending(self) -> list[int]:
        """Indices of the layers that keep keys and values."""
        return [i for i, layer in enumerate(self.layers) if layer.kv_heads]

    def empty(self) -> list[LayerKV]:
        """A prefix of no tokens."""
        return [
            (torch.empty(layer.kv_heads, 0, layer.head_dim), torch.empty(layer.kv_heads, 0, layer.v_head_dim))
            for layer in self.layers
        ]

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one prefix token over all layers, keys and values."""
        return sum(2 * layer.kv_heads * layer.width for layer in self.layers) * dtype.itemsize

    def to_json(self) -> str:
        return json.dumps([list(layer if layer.head_dim != layer.v_head_dim else layer[:2]) for layer in self.layers])

    @classmethod
    def from_json(cls, text: str) -> Geometry:
        """Inverse of `to_json`; anything else is a ValueError or a TypeError."""
        return cls(tuple(_layer(*layer) for layer in json.loads(text)))

    def __str__(self) -> str:
        kinds = dict.fromkeys(self.layers[i] for i in self.attending)
        of_all = "" if len(self.attending) == len(self.layers) else f"{len(self.attending)} of "
        return f"{of_all}{len(self.layers)} layers of {' or '.join(map(str, kinds))}"

    def checked(self, key_values: Sequence[LayerKV | None], what: str = "key_values") -> list[LayerKV]:
        """The layers of a prefix, with tensors without heads in place of None; ``what`` names it in errors.

        Raises:
            IncompatiblePrefix: layers are missing, or k or v of a layer is not ``[kv_heads, m, head_dim]`` with one m.
        """
        if not isinstance(key_values, Sequence) or len(key_values) != len(self.layers):
            count = len(key_values) if isinstance(key_values, Sequence) else type(key_values).__name__
            raise IncompatiblePrefix(
                f"{what}: expected one (k, v) pair for each of the model's {len(self.layers)} layers, got {count}"
            )
        tokens: int | None = None
        for i, (pair, layer) in enumerate(zip(key_values, self.layers, strict=True)):
            if pair is None and not layer.kv_heads:
                continue
            if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair)):
                got = "None" if pair is None else type(pair).__name__
                raise IncompatiblePrefix(f"{what}[{i}]: expected a pair of tensors (k, v), got {got}")
            for name, x, dim in zip("kv", pair, layer[1:], strict=True):
                expected = f"[{layer.kv_heads}, {'m' if tokens is None else tokens}, {dim}]"
                if x.ndim != 3 or (x.shape[0], x.shape[2]) != (layer.kv_heads, dim) or tokens not in (None, x.shape[1]):
                    raise IncompatiblePrefix(
                        f"{what}[{i}]: layer {i} takes {name} of shape [kv_heads, m, head_dim] "
                        f"= {expected}, got {list(x.shape)}"
                    )
                if not x.is_floating_point():
                    raise IncompatiblePrefix(f"{what}[{i}]: layer {i} takes floating-point {name}, got {x.dtype}")
                tokens = x.shape[1]
        nothing = torch.empty(0, tokens or 0, 0)
        return [(nothing, nothing) if pair is None else pair for pair in key_values]


def devices_of(key_values: Sequence[LayerKV]) -> tuple[torch.device, ...]:
    """The device of each layer's keys and values."""
    return tuple(k.device for k, _ in key_values)


def _layer(kv_heads: int, head_dim: int, v_head_dim: int | None = None) -> LayerGeometry:
    return LayerGeometry(int(kv_heads), int(head_dim), int(head_dim if v_head_dim is None else v_head_dim))
