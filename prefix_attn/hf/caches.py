"""A cache remembers whose prefixes its tokens were computed with.

The prefix is not in the cache. Tokens that come after those of a cache must be called with the same tasks again; with
others, with none, or with those of another bank, they would attend to another prefix, at other positions, than the
tokens before them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.cache_argument import CACHE
from prefix_attn.errors import IncompatiblePrefix
from prefix_attn.hf.attention import KEYWORD
from prefix_attn.hf.scope import scope
from prefix_attn.plan import recording

#: The attribute of a cache, or of an encoder's states, that holds a `Mark`.
MARK = "prefix_attn_tasks"


@dataclass(frozen=True, eq=False)
class Mark:
    """The tasks of a pass: a bank and int32 ``[batch]``; None of both for a pass without.

    ``given`` is the caller's own tensor, by which the next step is known without reading the device, and ``version``
    how often it had been written; ``task_ids`` is a copy that nobody writes. A mark that was on disk has lost its bank.
    """

    bank: PrefixBank | None
    task_ids: Tensor | None
    given: Tensor | None = None
    version: int | None = None

    @classmethod
    def of(cls, bank: PrefixBank | None, given: Tensor | None) -> Mark:
        return cls(bank, None if given is None else given.clone(), given, _version(given))

    def is_of(self, bank: PrefixBank | None, given: Tensor | None) -> bool:
        """Whether these are certainly the same, known without reading the device."""
        if given is None or self.given is not given or self.bank is not bank:
            return given is None and self.task_ids is None
        known = self.version is not None or not given.is_cpu  # tensors of the inference mode do not tell
        return known and self.version == _version(given)

    def __deepcopy__(self, memo: Any) -> Mark:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Mark, (None, self.task_ids)


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def check_tasks_of(cache: Any, bank: PrefixBank, task_ids: Tensor | None) -> None:
    """Compare a call's tasks, int32 ``[batch]`` or None, with those of the tokens in its cache.

    Not where it would cost a guard in a compiled graph, or, while the batch is of one size, a wait for the device:
    static caches on an accelerator, and other tensors there than the last call's.

    Raises:
        IncompatiblePrefix: the tokens in the cache were computed with other tasks.
    """
    if cache is None or torch.compiler.is_compiling():
        return
    mark: Mark | None = getattr(cache, MARK, None)
    if (mark is not None and mark.is_of(bank, task_ids)) or not has_tokens(cache):
        return
    if mark is None:
        if task_ids is None or isinstance(cache.get_seq_length(), Tensor) or not task_ids.is_cpu:
            return
        if bool((task_ids >= 0).any()):
            raise IncompatiblePrefix(
                f"{CACHE}: its tokens were computed outside the patched model, and without a prefix as far as "
                f"can be told, but these come with tasks {task_ids.tolist()} (by id); start a new cache"
            )
        return
    same = _same(mark, bank, task_ids)
    if not same:
        seen = "none" if mark.task_ids is None else f"{mark.task_ids.tolist()} (by id; -1 is none)"
        of_another = mark.bank is not None and mark.bank is not bank and task_ids is not None
        got = "none" if task_ids is None else f"{task_ids.tolist()}{' of another bank' if of_another else ''}"
        raise IncompatiblePrefix(
            f"task_ids: the tokens of the cache were computed with tasks {seen}, got {got}; give the same tasks "
            "again, or start a new cache"
        )


def _same(mark: Mark, bank: PrefixBank, task_ids: Tensor | None) -> bool:
    seen = mark.task_ids
    if seen is None or task_ids is None:
        ids = task_ids if seen is None else seen
        return ids is None or not bool((ids >= 0).any())
    if mark.bank is not None and mark.bank is not bank:
        return not bool((seen >= 0).any() or (task_ids >= 0).any())
    if len(seen) != len(task_ids):  # somebody has repeated or dropped rows
        return recording(task_ids) or _follows(task_ids.tolist(), seen.tolist())
    return not task_ids.is_cpu or torch.equal(seen, task_ids)


def _follows(given: list[int], seen: list[int]) -> bool:
    """Whether rows with tasks ``seen`` become ``given`` when each is repeated as often, or some are dropped."""
    if len(given) > len(seen):
        times, rest = divmod(len(given), len(seen))
        return not rest and given == [task for task in seen for _ in range(times)]
    left = iter(seen)
    return all(task in left for task in given)


def remember_tasks(decoder: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the decoder: mark the cache it returns with the tasks of the call."""
    batch = kwargs.get(KEYWORD) or scope().batch
    if isinstance(output, tuple):  # return_dict=False
        cache = next((x for x in output if isinstance(x, Cache)), None)
    else:
        cache = getattr(output, CACHE, None)
    if cache is None or batch is None or torch.compiler.is_exporting():
        return
    if torch.compiler.is_compiling():  # a look at the mark would be a guard, and a copy of the ids part of the graph
        setattr(cache, MARK, Mark(batch.bank, batch.task_ids, batch.task_ids))
    else:
        mark: Mark | None = getattr(cache, MARK, None)
        if mark is None or not mark.is_of(batch.bank, batch.task_ids):
            setattr(cache, MARK, Mark.of(batch.bank, batch.task_ids))


def has_tokens(cache: Any) -> bool:
    """Whether a cache holds tokens; False for a static one whose count is on an accelerator, or is being compiled."""
    length = cache.get_seq_length()
    cross = getattr(cache, "cross_attention_cache", None)
    if cross is not None and any(cache.is_updated.values()):
        length = length + cross.get_seq_length()  # a crop leaves the keys of the encoder's output
    if isinstance(length, Tensor) and (torch.compiler.is_compiling() or not length.is_cpu):
        return False
    return bool(length > 0)
