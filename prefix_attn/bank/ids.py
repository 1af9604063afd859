"""Task ids of a batch, from names, ids or a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from prefix_attn.bank.names import choices
from prefix_attn.checks import INTEGERS
from prefix_attn.errors import DTypeError, ShapeError, UnknownTask


def checked_ids(
    tasks: Sequence[str | int | None] | Tensor, ids: Mapping[str, int], lengths: Sequence[int], device: torch.device
) -> Tensor:
    """int32 ``[batch]`` on ``device``; see `PrefixBank.task_ids`."""
    if isinstance(tasks, Tensor):
        if tasks.dtype not in INTEGERS:
            raise DTypeError(f"task_ids: expected an integer tensor, got {tasks.dtype}")
        if tasks.ndim != 1:
            raise ShapeError(f"task_ids: expected one id per row, [batch], got {list(tasks.shape)}")
        if tasks.device.type == "cpu" and not torch.compiler.is_compiling():
            for row, task in enumerate(tasks.tolist()):
                _check_id(row, task, ids, lengths)
        return tasks.to(device=device, dtype=torch.int32)
    if isinstance(tasks, np.ndarray):
        tasks = tasks.tolist()
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        one = f"; for a batch of one write [{tasks!r}]" if isinstance(tasks, str | Integral) else ""
        raise DTypeError(
            f"task_ids: expected a list with a name, an id or None per row, or an integer tensor, got {tasks!r}{one}"
        )
    rows = [_row_id(row, task, ids, lengths) for row, task in enumerate(tasks)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _row_id(row: int, task: object, ids: Mapping[str, int], lengths: Sequence[int]) -> int:
    if task is None:
        return -1
    if isinstance(task, str):
        if task not in ids:
            raise UnknownTask(f"task_ids[{row}]: expected None or one of {choices(ids)}, got {task!r}")
        return ids[task]
    if isinstance(task, Integral) and not isinstance(task, bool):
        return _check_id(row, int(task), ids, lengths)
    raise DTypeError(f"task_ids[{row}]: expected a name, an id or None, got {task!r}")


def _check_id(row: int, task: int, ids: Mapping[str, int], lengths: Sequence[int]) -> int:
    if task == -1 or (0 <= task < len(lengths) and lengths[task] >= 0):
        return task
    removed = " (it was removed)" if 0 <= task < len(lengths) else ""
    known = choices(f"{i}: {name}" for name, i in ids.items())
    raise UnknownTask(f"task_ids[{row}]: expected -1 (no prefix) or one of {known}, got {task}{removed}")
