"""Which prefix each attention call of a model reads: found out by running the model, not from its config.

The model runs on one token behind a cache that holds a short prefix, and its attention calls are recorded. The first
keys and values of a call are the prefix as attention sees it.

- Where they equal, bit for bit, what some layer of the cache holds, the call reads that layer of the bank: its own, or
  another one where layers share keys.
- Elsewhere the model computes them from the cache (latent attention expands it, some families repeat heads or split
  values). Each task's keys and values are then recorded once in the same way, and kept beside the bank: they are
  called derived prefixes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.fingerprint import WRAPPED
from prefix_attn.bank.forward import cache_of_all_tokens, evaluating, in_full_precision
from prefix_attn.bank.geometry import LayerKV
from prefix_attn.bank.uses import BANK_LOCK
from prefix_attn.errors import UnsupportedModel
from prefix_attn.types import PrefixKV

#: The attribute of an attention module that holds a `Source` for each of its calls in a pass, in their order.
SOURCES = "_prefix_attn_sources"

NO_INTERFACE = "the family does not use transformers' attention interface, so its attention cannot be replaced"


class Source(NamedTuple):
    """What one attention call reads: layer ``layer`` of the bank, or the ``layer``-th of the prefixes derived from it.

    ``slides``: the model's cache forgets what is out of this layer's window, so its mask must have one too.
    ``apart``: other layers are called between two calls of this one.
    """

    layer: int
    derived: bool
    slides: bool
    apart: bool = False


class Call(NamedTuple):
    """One recorded attention call: its module, and keys and values ``[1, kv_heads, tokens, dim]``."""

    module: nn.Module
    key: Tensor
    value: Tensor


#: One thread at a time derives prefixes.
_DERIVING = threading.RLock()

#: Runs the unpatched model on one token behind the cache; returns its attention calls in their order.
Recorder = Callable[[Any], list[Call]]


class Sources:
    """The source of every attention call, and the prefixes that the model derives from a bank's.

    Args:
        model: whose calls ``record`` records.
        key_values: a prefix of the model, as the cache keeps it, of at least one token.

    Raises:
        UnsupportedModel: a layer keeps keys, but reads them in another way than through the attention interface.
    """

    def __init__(self, model: Any, key_values: Sequence[LayerKV], record: Recorder) -> None:
        self.model = model
        self.record = record
        self.sources: dict[nn.Module, tuple[Source, ...]] = {}
        self._derived: list[tuple[int, LayerKV]] = []  # index of the recorded call; its empty prefix
        self._kept: tuple[tuple[Any, ...], list[PrefixKV]] | None = None  # (what they depend on, derived prefixes)
        m = key_values[0][0].shape[1]
        read: set[int] = set()
        sliding = {i for i, x in enumerate(cache_of_all_tokens(model).layers) if hasattr(x, "sliding_window")}
        places: dict[nn.Module, list[int]] = {}
        with torch.no_grad():
            calls = self._calls_behind(key_values)
        for i, call in enumerate(calls):
            places.setdefault(call.module, []).append(i)
            if call.key.shape[2] != m + 1:
                continue  # not over [prefix ; own keys]: another kind of attention
            layer = next((i for i, pair in enumerate(key_values) if _reads(call, pair, m)), None)
            slides = (call.module.__dict__.get("layer_idx") if layer is None else layer) in sliding
            source = Source(len(self._derived) if layer is None else layer, derived=layer is None, slides=slides)
            if layer is None:
                k, v = _prefix_of(call)
                self._derived.append((i, (k[:, :0], v[:, :0])))
            else:
                read.add(layer)
            self.sources[call.module] = (*self.sources.get(call.module, ()), source)
        for module, found in self.sources.items():
            if places[module][-1] - places[module][0] >= len(places[module]):
                self.sources[module] = tuple(source._replace(apart=True) for source in found)
        if not self.sources:
            raise UnsupportedModel(f"{type(model).__name__}: {NO_INTERFACE}")
        kept = {i for i, (k, _) in enumerate(key_values) if k.shape[0]}
        if not self._derived and read != kept:
            raise UnsupportedModel(
                f"{type(model).__name__}: layers {sorted(kept - read)} keep keys and values, but do not read them "
                "through transformers' attention interface"
            )

    @property
    def derives(self) -> bool:
        """Whether some layer reads derived prefixes instead of the bank's own."""
        return bool(self._derived)

    def attach(self) -> None:
        """Tell each attention module what it reads."""
        for module, sources in self.sources.items():
            setattr(module, SOURCES, sources)

    def detach(self) -> None:
        """Undo `attach`."""
        for module in self.sources:
            module.__dict__.pop(SOURCES, None)

    def derived_from(self, bank: PrefixBank) -> list[PrefixKV]:
        """The derived prefixes, one for each call that reads one.

        Kept until the bank, the weights they depend on or the active adapters change; where those weights need
        gradients, computed at every pass.

        Raises:
            UnsupportedModel: each row has an adapter of its own, or the pass is being compiled.
        """
        if not self._derived:
            return []
        if torch.compiler.is_compiling():
            raise UnsupportedModel("torch.compile: this family makes keys of what the bank holds, in eager mode only")
        makers = [module for module, sources in self.sources.items() if sources[0].derived]
        if torch.is_grad_enabled() and any(p.requires_grad for module in makers for p in module.parameters()):
            return self._derive(bank)
        kept = self._kept  # read once: another thread may write it
        state = bank, bank.lengths, [_weights_of(module) for module in makers]
        if kept is None or kept[0] != state:
            with _DERIVING, torch.inference_mode(False), torch.no_grad():
                self._kept = kept = state, self._derive(bank)
        return kept[1]

    def _derive(self, bank: PrefixBank) -> list[PrefixKV]:
        with BANK_LOCK:
            lens = bank.lens.clone()  # a bank with a reserve writes its own in place, and these must fit what is packed
            filled = [task for task, m in enumerate(bank.lengths) if m > 0]
            bank.hold(filled)
        try:
            calls = {task: self._calls_behind(bank.key_values(task)) for task in filled}
        finally:
            bank.release(filled)
        result = []
        for i, nothing in self._derived:
            parts = {task: _prefix_of(recorded[i]) for task, recorded in calls.items()}
            packed = PrefixKV.pack([parts.get(task, nothing) for task in range(max(len(lens), 1))])
            there = lens.to(packed.k.device)
            result.append(PrefixKV(packed.k, packed.v, packed.starts[: len(lens)], there, packed.max_len))
        return result

    def _calls_behind(self, key_values: Sequence[LayerKV]) -> list[Call]:
        cache = cache_of_all_tokens(self.model)
        fill(cache, [key_values])
        with in_full_precision(self.model), evaluating(self.model):
            return self.record(cache)


def _weights_of(module: nn.Module) -> tuple[Any, ...]:
    """What tells whether a layer's weights have changed: how often each was written, and what its adapters add.

    Writes through ``.data`` are not counted by PyTorch. Those of adapters, whose hot swap writes so, are seen by a sum.
    """
    adapted: list[Any] = []
    layer: Any
    for layer in module.modules():
        adapted.append((len(layer._forward_hooks), len(layer._forward_pre_hooks)))
        if hasattr(layer, "active_adapters") and hasattr(layer, "adapter_layer_names"):
            if layer._forward_pre_hooks:
                raise UnsupportedModel(
                    "adapter_names: this family's layers make keys of what the bank holds, and each row's adapter "
                    "would make others; use one adapter a batch (set_adapter)"
                )
            inner = tuple(f"{name}." for name in WRAPPED)
            own = [p for name, p in layer.named_parameters() if not name.startswith(inner)]
            sums = torch.stack([p.detach().double().sum() for p in own]).tolist() if own else []
            state = list(layer.active_adapters), layer.disable_adapters, list(layer.merged_adapters)
            adapted.append((*state, dict(getattr(layer, "scaling", {})), sums))
    written = [-1 if p.is_inference() else p._version for p in module.parameters()]
    return [id(p) for p in module.parameters()], written, adapted


def fill(cache: Any, rows: Sequence[Sequence[LayerKV]]) -> None:
    """Put one prefix per row, all of one length, into an empty plain cache."""
    for i, (k, _) in enumerate(rows[0]):
        if k.numel():
            cache.update(*(torch.stack(x) for x in zip(*(row[i] for row in rows), strict=True)), i)


def widened(x: Tensor, width: int) -> Tensor:
    """``x [..., dim]`` padded with zeros to ``[..., width]``."""
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def _prefix_of(call: Call) -> tuple[Tensor, Tensor]:
    """All but the own token of a recorded call, in one width."""
    width = max(call.key.shape[3], call.value.shape[3])
    return widened(call.key[0, :, :-1], width), widened(call.value[0, :, :-1], width)


def _reads(call: Call, pair: LayerKV, m: int) -> bool:
    same_place = call.key.device == pair[0].device
    return same_place and torch.equal(call.key[0, :, :m], pair[0]) and torch.equal(call.value[0, :, :m], pair[1])
