"""What a bank knows of the frozen model its prefixes belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prefix_attn.bank.fingerprint import Fingerprint
from prefix_attn.bank.forward import cached_kv, text_config, unwrap
from prefix_attn.bank.geometry import Geometry, context_limit
from prefix_attn.errors import ContextOverflow, IncompatiblePrefix, UnsupportedModel


@dataclass(frozen=True)
class Base:
    """The frozen model of a bank.

    Attributes:
        geometry: kv_heads and head_dim of every layer.
        dtype, device: those of the keys and values in the model's attention.
        context_limit: positions the model has, or None.
        fingerprint: digests of config and weights.
        model_type: transformers' name of the architecture.
        name: where the model was loaded from (a hub id or a path); empty if unknown.
    """

    geometry: Geometry
    dtype: torch.dtype
    device: torch.device
    context_limit: int | None
    fingerprint: Fingerprint
    model_type: str
    name: str

    @classmethod
    def of(cls, model: Any) -> Base:
        """Describe a transformers model, PEFT-wrapped, patched or plain; runs it on one token.

        Raises:
            UnsupportedModel: the model does not keep plain keys and values in every layer, or is spread over devices.
        """
        model = unwrap(model)
        config = text_config(model)
        key_values = cached_kv(model, torch.zeros(1, 1, dtype=torch.int64))
        places = {(x.dtype, x.device) for pair in key_values for x in pair}
        if len(places) != 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in places))
            raise UnsupportedModel(f"model: expected all layers in one dtype and on one device, got {found}")
        dtype, device = places.pop()
        geometry = Geometry.of(key_values)
        return cls(
            geometry=geometry,
            dtype=dtype,
            device=device,
            context_limit=context_limit(config),
            fingerprint=Fingerprint.of(model, config, geometry),
            model_type=config.model_type,
            name=model.config.name_or_path or "",
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
        pairs: tuple[tuple[str, object, object], ...] = (
            ("geometry", self.geometry, other.geometry),
            ("dtype", self.dtype, other.dtype),
            ("device", self.device, other.device),
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
