"""The store: packed, ragged prefixes of many tasks, for every part (parts.py) of one frozen model.

A `PrefixKV` handed out by `PrefixBank.layer` is a snapshot that stays true whatever happens to the bank: its span
tables are never changed, and the memory it shows is not written again (see storage.py). Threads may change a bank
while others run models with it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefix_attn.bank import format as files
from prefix_attn.bank.base import Base
from prefix_attn.bank.card import card
from prefix_attn.bank.description import describe
from prefix_attn.bank.format import Provenance
from prefix_attn.bank.geometry import DECODER, Geometry, LayerKV
from prefix_attn.bank.hub import CARD, local_folder, upload
from prefix_attn.bank.ids import checked_ids
from prefix_attn.bank.lock import only_writer
from prefix_attn.bank.memory import MemoryUsage
from prefix_attn.bank.names import check_name, choices
from prefix_attn.bank.parts import KeyValues, Part, Reserve, prepared_parts
from prefix_attn.bank.peft import CONFIG as PEFT_CONFIG
from prefix_attn.bank.peft import local_adapter, read_adapter
from prefix_attn.bank.plans import LatestPlans, Plans
from prefix_attn.bank.text import text_kv
from prefix_attn.bank.uses import BANK_LOCK, Uses
from prefix_attn.bank.window import SlidingWindow
from prefix_attn.errors import DTypeError, IncompatiblePrefix, PrefixAttnError, ShapeError, UnknownTask
from prefix_attn.plan import BatchPlan
from prefix_attn.types import PrefixKV, align

#: The source of a prefix that `PrefixBank.add_text` made: prompts behind it do not open the sequence again.
TEXT = "text"


class _Task(NamedTuple):
    name: str
    provenance: Provenance


class PrefixBank:
    """Each task's prefix once, for every layer of one frozen model.

    Make one with `for_model` or `from_pretrained`. A task keeps its id (0, 1, ... in the order of adding) for the
    bank's life; the id of a removed task is never given again. Whatever fails leaves the bank as it was.

    A bank may be changed while models run with it: a generation that has begun ends with the prefixes it began with,
    also of a task that is removed or replaced meanwhile.
    """

    def __init__(self, base: Base, capacity: Mapping[str, int] | None = None, reserve: Reserve | None = None) -> None:
        self._base = base
        self._device = base.device
        self._parts = {
            part: Part(
                geometry, base.dtype, base.devices[part], self._device, base.shard, (capacity or {}).get(part, 0),
                reserve,
            )
            for part, geometry in base.geometries.items()
        }  # fmt: skip
        self._plans = {part: LatestPlans() for part in self._parts}
        self._tasks: list[_Task | None] = []  # by id; None was removed
        self._ids: dict[str, int] = {}
        self._uses = Uses()

    @classmethod
    def for_model(cls, model: Any, reserve: tuple[int, int] | None = None) -> PrefixBank:
        """An empty bank in the dtype of a transformers model, each layer on the device of the model's.

        The model may be plain, patched or PEFT-wrapped; it (of an encoder-decoder model the decoder) runs on one token,
        and its parameters are sampled.

        Args:
            model: the base.
            reserve: ``(tasks, tokens)``: take memory for that many ids (those of removed tasks count) and tokens (a
                prefix takes a multiple of 16) now, and never more. All tensors then keep their place and are changed
                in place, so that a captured CUDA graph sees tasks that are added and removed after its capture, and a
                compiled function is not compiled again. `add` refuses what does not fit. Without, a bank grows, and a
                graph captured before a change must not be replayed after it.

        Raises:
            UnsupportedModel: the model does not keep plain keys and values in every layer.
            ShapeError: a negative reserve.
        """
        if reserve is not None and min(reserve) < 0:
            raise ShapeError(f"reserve: expected (tasks, tokens), neither negative, got {reserve}")
        return cls(Base.of(model), reserve=None if reserve is None else Reserve(*reserve))

    def add(self, name: str, key_values: KeyValues, source: str = "tensors", replace: bool = False) -> int:
        """Add a task.

        Args:
            name: printable, without path separators; not yet in the bank, unless ``replace``.
            key_values: per layer (k, v) as the model's cache keeps them, each ``[kv_heads, m, head_dim]`` in any float
                dtype and on any device; copied and converted to the bank's. m may be 0. None for a layer that keeps no
                keys (`geometry` tells). For an encoder-decoder model a dict of such lists, keyed "decoder",
                "encoder" and "cross" (the decoder's attention to the encoder's output): m may differ between them, and
                one that is left out gets no prefix. A list alone is the decoder's.
            source: a word on where the values come from, kept in the file of the prefix; not "text".
            replace: if the name is in the bank, give it to this prefix, under a new id, and then `remove` the old one.

        Returns:
            The task's id.

        Raises:
            IncompatiblePrefix: a bad name, or parts, layers, shapes or values (not finite) that do not fit; names the
                layer.
            ContextOverflow: the decoder's m leaves no position for a request.
            ShapeError: it does not fit what the bank reserved.
        """
        if not isinstance(source, str) or not source.isprintable() or source == TEXT:
            raise IncompatiblePrefix(f"source: expected printable text other than {TEXT!r}, got {source!r}")
        return self._insert(name, key_values, Provenance(source), "key_values", replace)

    def load(
        self, name: str, path: str | os.PathLike[str], check_base: bool = True, replace: bool = False,
        revision: str | None = None,
    ) -> int:  # fmt: skip
        """Add a task from a PEFT prefix-tuning adapter, or from a ``.safetensors`` file of ours.

        Args:
            name: as in `add`.
            path: the adapter's folder, or its repository on the Hub, OWNER/NAME; or the file. No pickle is read.
            check_base: refuse a file of ours that was made for other weights. (PEFT's folders record only the name of
                their base model; another name gives a UserWarning.)
            replace: as in `add`.
            revision: the branch, tag or commit of a repository.

        Returns:
            The task's id.

        Raises:
            IncompatiblePrefix: the file is missing, damaged, a pickle, of another kind, or made for another model.
            ContextOverflow: as in `add`.
        """
        self._check_new(name, replace)
        path = local_adapter(path, revision)
        if not path.exists():
            raise IncompatiblePrefix(
                f"path: expected a file, a folder, or OWNER/NAME on the Hub, but {str(path)!r} does not exist"
            )
        key_values: KeyValues
        if (path / PEFT_CONFIG).is_file():
            key_values, provenance = read_adapter(path, self._base)
        elif path.is_dir():
            raise IncompatiblePrefix(
                f"path: expected a folder with {PEFT_CONFIG}, got {str(path)!r} without one; of a saved bank give one "
                ".safetensors file in it, or open all of it (PrefixBank.from_pretrained, --bank)"
            )
        else:
            key_values, provenance = files.read_prefix(path, self._base, check_base)
        return self._insert(name, key_values, provenance, str(path), replace)

    def add_text(
        self, name: str, tokenizer: Any, text: str, model: Any, add_special_tokens: bool = True, replace: bool = False
    ) -> int:
        """Add a task whose prefix is the model's own keys and values of a text at positions 0..m-1.

        Args:
            name: as in `add`.
            tokenizer: the model's; called as ``tokenizer(text, add_special_tokens=...)["input_ids"]``.
            text: for instance a system prompt, chat template applied.
            model: the bank's base model; it runs once, without gradients and dropout, and with the adapters (LoRA)
                that are active now: rows that use others later attend to keys that the text would not have under them.
            add_special_tokens: leave True for a text that opens the sequence (a BOS token belongs in front of it,
                unless it begins with one, as a chat template writes it); requests should then be tokenised without.
            replace: as in `add`.

        Returns:
            The task's id.

        Raises:
            IncompatiblePrefix: the text is empty, or the model is not the bank's base.
            UnsupportedModel: the model has an encoder, on whose input the decoder's keys and values of a text depend.
            ContextOverflow: the text leaves no position for a request.
        """
        self._check_new(name, replace)
        self._base.shard.check_whole("add_text")
        self.check_model(model)
        key_values = text_kv(tokenizer, text, model, self._base, add_special_tokens)
        return self._insert(name, key_values, Provenance(TEXT), "text", replace)

    def remove(self, name: str) -> None:
        """Remove a task: its name is gone at once; its id becomes an error for good, and its space free for others.

        Where generations are running with it, the latter when the last of them has ended (`hold`).

        Raises:
            UnknownTask: no such task; lists the choices.
        """
        with BANK_LOCK:
            task_id = self._id(name)
            self._ids = {other: i for other, i in self._ids.items() if i != task_id}
            self._drop(task_id)

    def hold(self, task_ids: Iterable[int]) -> None:
        """Keep the prefixes of these ids (-1 is passed over) until `release`, also of tasks that are removed meanwhile.

        ``generate`` and continuous batching do so by themselves.

        Raises:
            UnknownTask: one of the ids is not in the bank.
            DTypeError: something that is no id.
        """
        ids = {*task_ids}
        if names := [task for task in ids if not isinstance(task, int)]:
            raise DTypeError(f"task_ids: expected ids (`PrefixBank.task_ids` gives those of names), got {names[0]!r}")
        with BANK_LOCK:
            checked_ids(list(ids), self._ids, self.lengths, self._device)
            self._uses.begin(ids - {-1})

    def release(self, task_ids: Iterable[int]) -> None:
        """End what `hold` began for the same ids."""
        with BANK_LOCK:
            for task_id in self._uses.end({*task_ids} - {-1}):
                self._free(task_id)

    def _drop(self, task_id: int) -> None:
        """Free a task that has no name any more, now or when nobody holds it."""
        self._tasks[task_id] = None
        if self._uses.leave(task_id):
            self._free(task_id)

    def _free(self, task_id: int) -> None:
        for part in self._parts.values():
            part.remove(task_id)

    def _check_new(self, name: str, replace: bool) -> None:
        if check_name(name) in self._ids and not replace:
            raise IncompatiblePrefix(
                f"name: {name!r} is already in the bank; give another, remove it first, or pass replace=True"
            )

    def _insert(
        self, name: str, key_values: KeyValues, provenance: Provenance, what: str, replace: bool = False
    ) -> int:
        self._check_new(name, replace)
        ours = prepared_parts(key_values, self._base.geometries, self.dtype, self._base.devices, what)
        self._base.check_context(ours[DECODER][0][0].shape[1], what)
        with BANK_LOCK:
            self._check_new(name, replace)  # again: another thread may have been faster
            stored: list[Part] = []
            try:
                for part, layers in ours.items():
                    self._parts[part].append(layers)
                    stored.append(self._parts[part])
            except BaseException:
                for done in stored:
                    done.undo_append()
                raise
            old, new = self._ids.get(name), len(self._tasks)
            self._tasks.append(_Task(name, provenance))
            # In one step: whoever looks meanwhile finds the old one or the new one.
            self._ids = {other: i for other, i in self._ids.items() if i != old} | {name: new}
            if old is not None:
                self._drop(old)
            return new

    def _id(self, name: str) -> int:
        if name not in self._ids:
            raise UnknownTask(f"name: expected one of {choices(self._ids)}, got {name!r}")
        return self._ids[name]

    def layer(self, i: int, part: str = DECODER) -> PrefixKV:
        """Layer i's prefixes, sharing the bank's memory: a snapshot, so ask again after a change of the bank.

        part: "decoder"; in an encoder-decoder model also "encoder" and "cross".
        """
        return self._part(part).layer(i)

    def layers_of_pass(self, task_ids: Tensor) -> Callable[[int], PrefixKV]:
        """What gives the decoder's layers to one pass of the model, with these ids: `layer`."""
        return self.layer

    def _part(self, part: str) -> Part:
        if part not in self._parts:
            raise PrefixAttnError(f"part: expected one of {[*self._parts]}, got {part!r}")
        return self._parts[part]

    def task_ids(self, tasks: Sequence[str | int | None] | Tensor) -> Tensor:
        """One id per row: int32 ``[batch]`` on the bank's device; -1 for a row without prefix.

        Args:
            tasks: per row a name, an id, or None (also -1) for no prefix; or an integer tensor ``[batch]`` of ids. A
                tensor on an accelerator is not read back: there the kernels answer a wrong id with NaN.

        Raises:
            UnknownTask: a name or an id is not in the bank; lists the choices.
            DTypeError, ShapeError: not a list or an integer vector.
        """
        if torch.compiler.is_compiling() and isinstance(tasks, Tensor):
            return checked_ids(tasks, {}, (), self._device)  # not looked up: a graph would be of these tasks alone
        return checked_ids(tasks, self._ids, self.lengths, self._device)

    def plan(self, tasks: Sequence[str | int | None] | Tensor, part: str = DECODER) -> BatchPlan:
        """Which rows of a batch share which prefix, for all layers and steps; the ``plan`` of `prefix_attention`.

        Costs nothing until a kernel needs it. Make a new one for other rows, or after a change of the bank.

        Args, Raises: as in `task_ids`; part as in `layer`. Of a list the host knows how many tasks share the batch,
        which a tensor on a GPU does not tell.
        """
        ids, distinct = self.task_ids(tasks), None
        if not isinstance(tasks, Tensor):
            named = self._ids  # read once: another thread may write it
            distinct = len({named.get(x, x) if isinstance(x, str) else x for x in tasks} - {None, -1})
        return self.plans(ids, part, distinct)[self.device]

    def plans(self, task_ids: Tensor, part: str = DECODER, distinct: int | None = None) -> Plans:
        """`plan` for each device that layers are on, of ids that `task_ids` returned.

        The latest are kept: asked for the same tensor again, and the bank unchanged, these are returned.
        """
        lens = self._part(part).lens
        return self._plans[part].of(task_ids, lens, distinct)

    def source(self, name: str) -> str:
        """Where a task's prefix came from: "text", "trained", "peft:<folder>", or what `add` was told.

        UnknownTask where there is no such task.
        """
        with BANK_LOCK:
            task = self._tasks[self._id(name)]
        assert task is not None, "a name in the bank has a task"
        return task.provenance.source

    def prefix_len(self, name: str, part: str = DECODER) -> int:
        """Tokens of a task's prefix in a part; UnknownTask where there is no such task."""
        with BANK_LOCK:
            return self._part(part).lengths[self._id(name)]

    @property
    def names(self) -> list[str]:
        """Names of the tasks, in the order of their ids."""
        return list(self._ids)

    def named(self, source: str | None = None) -> dict[int, str]:
        """Names by id, of all tasks or of those from one `source`, as they are at one moment."""
        with BANK_LOCK:
            return {i: name for name, i in self._ids.items() if source is None or self.source(name) == source}

    @property
    def lens(self) -> Tensor:
        """Tokens of the decoder's prefixes, int32 ``[tasks]`` on the device, by id; -1 for a removed task.

        Each change makes a new one; with a reserve it is written in place, and has an entry for every id there can be.
        """
        return self._parts[DECODER].lens[self.device]

    @property
    def lengths(self) -> list[int]:
        """Tokens of the decoder's prefixes by id, of all ids given so far, on the host; -1 for a removed task."""
        return list(self._parts[DECODER].lengths)

    @property
    def parts(self) -> list[str]:
        """The attentions that take a prefix: "decoder"; in an encoder-decoder model also "encoder" and "cross"."""
        return list(self._parts)

    @property
    def base(self) -> Base:
        """What is known of the frozen model."""
        return self._base

    @property
    def geometry(self) -> Geometry:
        """Layers of the decoder's self-attention; those of every part are in ``base.geometries``."""
        return self._base.geometry

    @property
    def num_layers(self) -> int:
        return len(self._base.geometry.layers)

    @property
    def dtype(self) -> torch.dtype:
        return self._base.dtype

    @property
    def device(self) -> torch.device:
        """Where task ids are; each layer's prefixes are where that layer is."""
        return self._device

    @property
    def context_limit(self) -> int | None:
        """Positions the model has, prefix included; None where nothing limits them."""
        return self._base.context_limit

    @property
    def sliding_window(self) -> SlidingWindow | None:
        """Which layers slide, and what they hide of a prefix; None where none does."""
        return self._base.window

    def room(self, name: str) -> int | None:
        """Positions left for a request's own tokens, new ones included: the model's less the task's prefix.

        None where nothing limits them. (The last new token needs none.) UnknownTask where there is no such task.
        """
        limit = self.context_limit
        return None if limit is None else limit - self.prefix_len(name)

    @property
    def memory_usage(self) -> MemoryUsage:
        """Exact bytes per task, in total, and allocated; print it. Tasks that were removed while held are allocated."""
        with BANK_LOCK:
            parts = [(part.geometry.token_bytes(self._base.dtype), part.lengths) for part in self._parts.values()]
            tasks = {name: sum(token * lengths[i] for token, lengths in parts) for name, i in self._ids.items()}
            allocated = sum(part.nbytes for part in self._parts.values())
        return MemoryUsage(tasks=tasks, total=sum(tasks.values()), allocated=allocated)

    def check_model(self, model: Any) -> None:
        """Raise `IncompatiblePrefix` unless the model is the bank's base: geometry, dtype, device, config and weights.

        Runs the model on one token and samples its parameters, as `for_model` does.
        """
        self._base.check_same(Base.of(model))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file per task and the index ``bank.json``, which decides what is loaded again.

        Files of the same names are replaced; others stay. Ids are not saved: they count anew from 0.
        """
        self._save(Path(folder), keep_others=False)

    def save_into(self, folder: str | os.PathLike[str]) -> None:
        """`save_pretrained` beside the tasks of a bank that is saved there already: their files are not touched.

        A task of the same name is replaced. Whether the others fit the same model is found out when they are loaded.
        Processes that save into one folder at a time wait for each other, where the file system has locks.

        Raises:
            IncompatiblePrefix: what is there cannot be read.
        """
        self._save(Path(folder), keep_others=True)

    def push_to_hub(self, repo_id: str, private: bool | None = None, commit_message: str = "Upload prefixes") -> str:
        """`save_pretrained` into a repository on the Hub, made if there is none, with a page that lists the tasks.

        Args:
            repo_id: OWNER/NAME; a page (README.md) that is there stays as it is.
            private: whether a repository that is made is; the owner's default otherwise.
            commit_message: what the commit is called.

        Returns:
            The address of the commit.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            Path(folder, CARD).write_text(card(self, repo_id), encoding="utf-8")
            return upload(Path(folder), repo_id, private, commit_message)

    def _save(self, folder: Path, keep_others: bool) -> None:
        self._base.shard.check_whole("save_pretrained")
        folder.mkdir(parents=True, exist_ok=True)
        with BANK_LOCK:
            tasks = {i: task for i, task in enumerate(self._tasks) if task is not None}
            self.hold(tasks)
        try:
            with only_writer(folder):
                others = files.read_index(folder) if keep_others and (folder / files.INDEX).is_file() else {}
                names = files.file_names([task.name for task in tasks.values()], others)
                for i, task in tasks.items():
                    key_values = {name: part.read(i) for name, part in self._parts.items()}
                    files.write_prefix(folder / names[task.name], key_values, self._base, task.provenance)
                files.write_index(folder, names)
        finally:
            self.release(tasks)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], model: Any, check_base: bool = True, revision: str | None = None
    ) -> PrefixBank:
        """A bank saved by `save_pretrained`, for the same model (its dtype and device may differ).

        Args:
            folder: on this machine, or a repository on the Hub, OWNER/NAME.
            model: the base model, as in `for_model`.
            check_base: refuse prefixes made for other weights or another config.
            revision: the branch, tag or commit of a repository.

        Raises:
            IncompatiblePrefix: a file is missing, damaged, or made for another model.
        """
        folder = local_folder(folder, files.INDEX, lambda found: files.read_index(found).values(), revision)
        base = Base.of(model)
        names = files.read_index(folder)
        # Heads first, then one file after the other: in memory is no more than the bank and a prefix.
        lengths = [files.tokens_of(folder / file) for file in names.values()]
        bank = cls(base, {part: sum(align(of_task.get(part, 0)) for of_task in lengths) for part in base.geometries})
        for name, file in names.items():
            bank._insert(name, *files.read_prefix(folder / file, base, check_base), file)
        return bank

    def key_values(self, task: str | int, part: str = DECODER) -> list[LayerKV]:
        """What was added under a name or an id, in the bank's dtype: views, per layer (k, v); no heads where it keeps
        no keys.

        Raises:
            UnknownTask: no such task; lists the choices.
        """
        with BANK_LOCK:
            task_id = self._id(task) if isinstance(task, str) else task
            if task_id < 0:
                raise UnknownTask(f"task: expected one of {choices(self._ids)}, or an id, got {task!r}")
            return self._part(part).read(int(self.task_ids([task_id])))

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixBank:
        """The tasks that have a name: nobody holds those of a copy."""
        with BANK_LOCK:
            twin = type(self).__new__(type(self))
            memo[id(self)] = twin
            twin.__setstate__({name: copy.deepcopy(x, memo) for name, x in vars(self).items() if name != "_uses"})
        return twin

    def __copy__(self) -> PrefixBank:
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(copy.deepcopy(self)).items() if name != "_uses"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _uses=Uses())
        for task_id, task in enumerate(self._tasks):
            if task is None and self._parts[DECODER].lengths[task_id] >= 0:
                self._free(task_id)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def __repr__(self) -> str:
        return describe(self)
