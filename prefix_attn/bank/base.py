"""What a bank knows of the frozen model its prefixes belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from prefix_attn.bank.config import context_limit, text_config
from prefix_attn.bank.fingerprint import Fingerprint
from prefix_attn.bank.forward import cached_kv, unwrap
from prefix_attn.bank.geometry import CROSS, DECODER, ENCODER, Geometry, devices_of
from prefix_attn.bank.seq2seq import decoder_kv, decoder_positions, encoder_devices, encoder_geometry
from prefix_attn.bank.shard import Shard
from prefix_attn.bank.unsupported import refuse_without_place
from prefix_attn.bank.window import SlidingWindow
from prefix_attn.errors import ContextOverflow, IncompatiblePrefix, UnsupportedModel


@dataclass(frozen=True)
class Base:
    """The frozen model of a bank.

    Attributes:
        geometries: kv_heads and head_dim of every layer, for each part (parts.py) of the model; the decoder first.
        dtype: of the keys and values in the model's attention.
        devices: of every layer's keys and values, for each part; several where the model is spread (``device_map``).
        context_limit: positions the model has, or None.
        fingerprint: digests of config and weights.
        model_type: transformers' name of the architecture.
        name: where the model was loaded from (a hub id or a path); empty if unknown.
        window: of the layers that slide, if any.
        shard: which heads this process holds of a tensor-parallel model; geometries are the whole model's.
    """

    geometries: Mapping[str, Geometry]
    dtype: torch.dtype
    devices: Mapping[str, tuple[torch.device, ...]]
    context_limit: int | None
    fingerprint: Fingerprint
    model_type: str
    name: str
    shard: Shard
    window: SlidingWindow | None

    @classmethod
    def of(cls, model: Any) -> Base:
        """Describe a transformers model, PEFT-wrapped, patched or plain; runs it on one token.

        Raises:
            UnsupportedModel: the model does not keep plain keys and values in every layer, or not in one dtype, or a
                prefix has no place in its family.
        """
        model = unwrap(model)
        config = text_config(model)
        refuse_without_place(model)
        if config.is_encoder_decoder:
            decoder, cross = decoder_kv(model)
            key_values, limit = decoder + cross, decoder_positions(config)
            geometries = {
                DECODER: Geometry.of(decoder), ENCODER: encoder_geometry(model), CROSS: Geometry.of(cross),
            }  # fmt: skip
            devices = {
                DECODER: devices_of(decoder), ENCODER: encoder_devices(model, decoder[0][0].device),
                CROSS: devices_of(cross),
            }  # fmt: skip
        else:
            key_values, limit = cached_kv(model, torch.zeros(1, 1, dtype=torch.int64)), context_limit(config)
            geometries, devices = {DECODER: Geometry.of(key_values)}, {DECODER: devices_of(key_values)}
        shard = Shard.of(model, config, geometries[DECODER])
        geometries = {part: shard.whole(geometry) for part, geometry in geometries.items()}
        dtypes = {x.dtype for pair in key_values for x in pair if x.shape[0]}
        if len(dtypes) != 1:
            raise UnsupportedModel(
                f"model: expected all layers in one dtype, got {', '.join(sorted(map(str, dtypes)))}; load it in one"
            )
        return cls(
            geometries=geometries,
            dtype=dtypes.pop(),
            devices=devices,
            context_limit=limit,
            fingerprint=Fingerprint.of(model, config, geometries),
            model_type=config.model_type,
            name=model.config.name_or_path or "",
            shard=shard,
            window=SlidingWindow.of(config),
        )

    @property
    def geometry(self) -> Geometry:
        """That of the decoder's self-attention."""
        return self.geometries[DECODER]

    @property
    def device(self) -> torch.device:
        """That of the decoder's first layer with keys, where a batch's task ids are kept."""
        return self.devices[DECODER][self.geometry.attending[0]]

    @property
    def placement(self) -> str:
        """`devices` in words."""
        everywhere = {device for layers in self.devices.values() for device in layers}
        if len(everywhere) == 1:
            return str(self.device)
        return "; ".join(
            f"{part}: " + ", ".join(f"{len(list(run))} layers on {device}" for device, run in groupby(layers))
            for part, layers in self.devices.items()
        )

    def check_context(self, tokens: int, what: str) -> None:
        """Raise `ContextOverflow` unless a prefix of ``tokens`` leaves room for at least one token of a request."""
        if self.context_limit is not None and tokens >= self.context_limit:
            raise ContextOverflow(
                f"{what}: expected at most {self.context_limit - 1} prefix tokens, got {tokens}; the "
                f"model has {self.context_limit} positions and a request needs at least one"
            )

    def check_same(self, other: Base) -> None:
        """Raise `IncompatiblePrefix` unless ``other`` would compute with this base's prefixes exactly as this one."""
        mine, theirs = (" and ".join(map(str, base.geometries.values())) for base in (self, other))
        pairs: tuple[tuple[str, object, object], ...] = (
            ("geometry", mine, theirs),
            ("dtype", self.dtype, other.dtype),
            ("device", self.placement, other.placement),
            ("shard", self.shard, other.shard),
        )
        for what, expected, got in pairs:
            if expected != got:
                raise IncompatiblePrefix(
                    f"model: the bank's {what} is {expected}, the model's is {got}; "
                    "make a bank for this model with PrefixBank.for_model"
                )
        self.check_fingerprint(other.fingerprint, "model", "make a bank for this model with PrefixBank.for_model")

    def check_fingerprint(self, other: Fingerprint, what: str, advice: str) -> None:
        """Raise `IncompatiblePrefix` unless ``other`` is the fingerprint of this base; ``what`` names its owner."""
        for part in ("config", "weights"):
            mine, theirs = getattr(self.fingerprint, part), getattr(other, part)
            if mine != theirs:
                raise IncompatiblePrefix(
                    f"{what}: expected the fingerprint {mine[:12]} of the bank's base model's "
                    f"{part}, got {theirs[:12] or 'none'}; {advice}"
                )
