"""Prefixes as parameters of a frozen model that is patched, so that one batch trains many tasks.

    prefix_t = p_t                                               p_t begins as start_t
    prefix_t = start_t + W2 tanh(W1 e_t + b1) + b2               with a projection; W2 and b2 begin as 0

A token of a prefix is a row: its keys and values in all layers, side by side as PEFT lays them out. Whatever the start,
the first pass is that of the start itself. Each task has a projection of its own, which is gone when training is over.

Source: prefix tuning and its reparameterisation, arXiv:2101.00190.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from prefix_attn.bank import Base, PrefixBank
from prefix_attn.bank.forward import unwrap
from prefix_attn.bank.geometry import DECODER, LayerKV
from prefix_attn.errors import IncompatiblePrefix, ShapeError, UnknownTask, UnsupportedModel
from prefix_attn.hf import patch, unpatch
from prefix_attn.hf.adapters import is_attached
from prefix_attn.hf.patching import layers_read_the_bank
from prefix_attn.hf.sources import widened
from prefix_attn.hf.wiring import bank_of
from prefix_attn.types import PrefixKV, align

#: Hidden width of a prefix's MLP.
PROJECTION = 128


class TrainablePrefixes(nn.Module):
    """The prefixes of several tasks, float32 parameters; its modules and parameters are grouped by task.

    Args:
        model: a decoder-only transformers model, or a PEFT model around one. Adapters beside the prefixes may learn
            too, but not the weights of the base: prefixes fit only those they were made for.
        start: by task, what its prefix is at first: per layer (k, v), each ``[kv_heads, m, head_dim]``, as
            `PrefixBank.key_values` gives it; m at least 1.
        projection: hidden width of the MLP; None trains keys and values themselves.
        seed: of the MLPs; with the name of a task it decides what the task's begins as, whatever others there are.

    Attributes:
        lazy: make only the prefixes of a pass's tasks, which is faster where there are many. The parameters of others
            then get no gradient, where they else get one of zeros, as DistributedDataParallel expects.

    Raises:
        IncompatiblePrefix: there is no task, or a start does not fit the model.
        UnsupportedModel: a model with an encoder, or one of which this process holds a part.
        ShapeError: a projection without width.
    """

    def __init__(
        self, model: Any, start: Mapping[str, Sequence[LayerKV]], projection: int | None = PROJECTION, seed: int = 0
    ) -> None:
        super().__init__()
        self.lazy = False
        base = Base.of(model)
        if len(base.geometries) > 1:
            raise UnsupportedModel(
                f"{base.model_type}: prefixes of encoder-decoder models are not trained here; train them with PEFT, "
                "and take them with bank.load"
            )
        base.shard.check_whole("training")
        if not start:
            raise IncompatiblePrefix("start: expected at least one task, got none")
        self.bank = _LiveBank(base)
        self.bank.prefixes = self
        self.names = list(start)
        if projection is not None and projection < 1:
            raise ShapeError(f"projection: expected None or a width of at least 1, got {projection}")
        self._geometry = base.geometry
        self.tasks = nn.ModuleList()
        for name, key_values in start.items():
            self.bank.add(name, key_values)
            if not self.bank.prefix_len(name):
                raise IncompatiblePrefix(f"start[{name!r}]: expected a prefix of at least one token, got none to train")
            rows = _rows(self.bank.stored_values(name))
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(crc32(f"{seed}/{name}".encode()))
                task = _Direct(rows) if projection is None else _Projected(rows, projection)
            self.tasks.append(task.to(base.device))

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Those that make a task's prefix, and no other's; UnknownTask where there is no such task."""
        return list(self._task(name).parameters())

    def _task(self, name: str) -> nn.Module:
        if name not in self.names:
            raise UnknownTask(f"name: expected one of {self.names}, got {name!r}")
        return self.tasks[self.names.index(name)]

    def key_values(self, name: str) -> list[LayerKV]:
        """A task's prefix as it is now, for `PrefixBank.add`: per layer (k, v), ``[kv_heads, m, head_dim]`` each.

        UnknownTask where there is no such task.
        """
        dtype = self.bank.dtype
        with torch.no_grad(), torch.autocast(self.bank.device.type, enabled=False):
            return [(k.to(dtype, copy=True), v.to(dtype, copy=True)) for k, v in self._layers(self._task(name)())]

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Within, ``model(..., task_ids=...)`` reads these prefixes, and gradients reach their parameters.

        A model that was patched gets its bank back.

        Raises:
            UnsupportedModel: as `prefix_attn.patch`; or the family's layers read a copy of a prefix, or keys that they
                make of it.
            IncompatiblePrefix: not the model that these were made for.
        """
        inner = unwrap(model)
        before = bank_of(inner)
        patched = model if model is inner or is_attached(model) else inner  # a PEFT wrapper, or what is in it
        patch(model, self.bank)
        try:
            if not layers_read_the_bank(inner):
                raise UnsupportedModel(
                    f"{type(inner).__name__}: its layers read a copy of a prefix, or keys made of it, which gradients "
                    "do not pass; train the prefix with PEFT, and take it with bank.load"
                )
            yield
        finally:
            unpatch(model)
            if before is not None:
                patch(patched, before)

    def forward(self, present: Sequence[int] | None = None) -> list[PrefixKV]:
        """The prefixes of the tasks with these ids, or of all, for every layer; other ids are as of removed tasks.

        In full precision whatever autocast says, and with gradients.
        """
        ids = range(len(self.tasks)) if present is None else present
        with torch.autocast(self.bank.device.type, enabled=False):
            made = [self.tasks[i]() for i in ids]
            rows = torch.cat([pad(x, (0, 0, 0, align(len(x)) - len(x))) for x in made])
        starts, lens, end = [0] * len(self.tasks), [-1] * len(self.tasks), 0
        for i, x in zip(ids, made, strict=True):
            starts[i], lens[i], end = end, len(x), end + align(len(x))
        devices = {*self.bank.base.devices[DECODER]}
        starts_on, lens_on = (
            {device: torch.tensor(x, dtype=torch.int32, device=device) for device in devices} for x in (starts, lens)
        )
        stored = [self.bank.layer(i) for i in range(self.bank.num_layers)]
        return [
            PrefixKV(
                _like(plain.k, k), _like(plain.v, v), starts_on[plain.k.device], lens_on[plain.k.device], max(lens)
            )
            for plain, (k, v) in zip(stored, self._layers(rows), strict=True)
        ]

    def get_extra_state(self) -> Tensor:
        """The tasks, whose parameters a state dict has by number; bytes of JSON, since safetensors keeps tensors."""
        return torch.tensor(list(json.dumps(self.names).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise `IncompatiblePrefix` for a state dict of other tasks, or in another order."""
        names = json.loads(bytes(state.tolist()))
        if names != self.names:
            raise IncompatiblePrefix(f"state_dict: expected one of the tasks {self.names}, got one of {names}")

    def _layers(self, rows: Tensor) -> list[LayerKV]:
        """Keys and values ``[kv_heads, tokens, head_dim]`` of every layer, from rows ``[tokens, width]``."""
        layers, start = [], 0
        for layer in self._geometry.layers:
            pair = []
            for dim in (layer.head_dim, layer.v_head_dim):
                x = rows[:, start : start + layer.kv_heads * dim]
                pair.append(x.view(len(rows), layer.kv_heads, dim).transpose(0, 1))
                start += layer.kv_heads * dim
            layers.append((pair[0], pair[1]))
        return layers


class _LiveBank(PrefixBank):
    """A bank whose layers are computed anew for each pass; ids, lengths and `layer` are those of the starts."""

    prefixes: TrainablePrefixes

    def layers_of_pass(self, task_ids: Tensor) -> Callable[[int], PrefixKV]:
        """Those of its tasks. The pass keeps them: checkpointing asks again, whatever has come meanwhile."""
        present = None
        if self.prefixes.lazy and not torch.compiler.is_compiling():  # a graph must not depend on which tasks there are
            present = sorted({*task_ids.tolist()} - {-1})
        return self.prefixes.forward(present).__getitem__

    def key_values(self, task: str | int, part: str = DECODER) -> list[LayerKV]:
        return self.prefixes.key_values(self.names[task] if isinstance(task, int) else task)

    def stored_values(self, name: str) -> list[LayerKV]:
        return super().key_values(name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, as of a bank that others may be changing, would have a copy of the prefixes, which have a bank.
        return {name: x for name, x in vars(self).items() if name != "_uses"}

    def _save(self, folder: Path, keep_others: bool) -> None:
        raise UnsupportedModel("bank: its prefixes are being trained; add their key_values to a bank, and save that")


class _Direct(nn.Module):
    """Rows that are parameters themselves."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(start)

    def forward(self) -> Tensor:
        return self.rows


class _Projected(nn.Module):
    """Rows that an MLP adds to their start."""

    def __init__(self, start: Tensor, projection: int) -> None:
        super().__init__()
        tokens, width = start.shape
        self.register_buffer("start", start)
        self.embedding = nn.Parameter(torch.randn(tokens, projection, dtype=start.dtype))
        self.mlp = nn.Sequential(
            nn.Linear(projection, projection, dtype=start.dtype),
            nn.Tanh(),
            nn.Linear(projection, width, dtype=start.dtype),
        )
        for parameter in self.mlp[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self) -> Tensor:
        added: Tensor = self.start + self.mlp(self.embedding)
        return added


def _like(stored: Tensor, x: Tensor) -> Tensor:
    """``x`` in the width, dtype and place of what a bank stores."""
    return widened(x, stored.shape[2]).to(stored)


def _rows(key_values: Sequence[LayerKV]) -> Tensor:
    """``[m, width]``, float32: the keys and values of all layers side by side."""
    return torch.cat([x.transpose(0, 1).flatten(1).float().cpu() for pair in key_values for x in pair], dim=1)
