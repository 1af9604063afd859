"""A cache remembers whose prefixes its tokens were computed with.

The prefix is not in the cache. Tokens that come after those of a cache must be called with the same tasks again; with
others, or with none, they would attend to another prefix, at other positions, than the tokens before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefix_attn.errors import IncompatiblePrefix
from prefix_attn.hf.attention import KEYWORD
from prefix_attn.hf.masks import scope

#: The attribute of a cache that holds the tasks of its rows, int32 ``[batch]``.
MARK = "prefix_attn_task_ids"


def check_tasks_of(cache: Any, task_ids: Tensor | None) -> None:
    """Compare a call's tasks, int32 ``[batch]`` or None, with those of the tokens in its cache.

    Not where it would cost a wait for the device, or a guard in a compiled graph: static caches, and other tensors than
    the last call's on an accelerator. Nor after the user has changed the cache's batch.

    Raises:
        IncompatiblePrefix: the tokens in the cache were computed with other tasks.
    """
    if cache is None or torch.compiler.is_compiling():
        return
    seen: Tensor | None = getattr(cache, MARK, None)
    if seen is not None and seen is not task_ids and has_tokens(cache):
        if task_ids is None:
            same = not bool((seen >= 0).any())
        else:
            same = len(seen) != len(task_ids) or task_ids.device.type != "cpu" or torch.equal(seen, task_ids)
        if not same:
            got = "none" if task_ids is None else task_ids.tolist()
            raise IncompatiblePrefix(
                f"task_ids: the tokens in past_key_values were computed with tasks {seen.tolist()} (by id; -1 is "
                f"none), got {got}; give the same tasks again, or start a new cache"
            )


def remember_tasks(decoder: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the decoder: mark the cache it returns with the tasks of the call."""
    cache, batch = getattr(output, "past_key_values", None), kwargs.get(KEYWORD) or scope.batch
    if cache is not None and batch is not None and batch.task_ids is not None and not torch.compiler.is_compiling():
        setattr(cache, MARK, batch.task_ids)


def has_tokens(cache: Any) -> bool:
    """Whether a cache holds tokens; False where only its device knows (a static one)."""
    length = cache.get_seq_length()
    return isinstance(length, int) and length > 0
