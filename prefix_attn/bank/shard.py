"""A model split by heads over processes (tensor parallelism): this process's part of every key/value head table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prefix_attn.bank.config import setting
from prefix_attn.bank.geometry import Geometry
from prefix_attn.errors import UnsupportedModel


@dataclass(frozen=True)
class Shard:
    """Process ``rank`` of ``size``, which holds the rank-th run of ``kv_heads / size`` heads of every layer."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, model: Any, config: Any, local: Geometry) -> Shard:
        """That of a transformers model with a tensor-parallel plan; ``local``: what its cache holds in this process.

        Raises:
            UnsupportedModel: the plan leaves the key/value heads of a layer whole.
        """
        size = getattr(model, "_tp_size", None) or 1
        if size == 1:
            return cls()
        heads = setting(config, "num_key_value_heads") or setting(config, "num_attention_heads")
        if any(local.layers[i].kv_heads * size != heads for i in local.attending):
            raise UnsupportedModel(
                f"model: expected its tensor-parallel plan to split the {heads} key/value heads of every layer over "
                f"{size} processes, got {local} in one; use fewer processes"
            )
        mesh = model._device_mesh
        return cls(mesh["tp"].get_local_rank() if "tp" in (mesh.mesh_dim_names or ()) else mesh.get_local_rank(), size)

    def whole(self, local: Geometry) -> Geometry:
        """The model's geometry, from that of this process."""
        return Geometry(tuple(layer._replace(kv_heads=layer.kv_heads * self.size) for layer in local.layers))

    def local(self, whole: Geometry) -> Geometry:
        """The geometry of this process, from the model's."""
        return Geometry(tuple(layer._replace(kv_heads=layer.kv_heads // self.size) for layer in whole.layers))

    def heads(self, x: Tensor) -> Tensor:
        """This process's heads of ``x [kv_heads, m, head_dim]``."""
        return x.chunk(self.size)[self.rank]

    def check_whole(self, what: str) -> None:
        """Raise `UnsupportedModel` for what one process alone cannot do."""
        if self.size > 1:
            raise UnsupportedModel(
                f"{what}: this process holds the heads of rank {self.rank} of {self.size} only; do it with a bank of "
                "the model in one process, save that, and open it with PrefixBank.from_pretrained here"
            )
