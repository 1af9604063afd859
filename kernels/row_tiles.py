"""Which query rows of a batch share a prefix: the tiles of grouped decode, found on the device.

    rank_b   = |{j < b : task_j = task_b}|          size_b = |{j : task_j = task_b}|
    before_b = sum of ceil(size_j * rows / TILE_ROWS) over the rows j of rank 0 with task_j < task_b
    query row r of row b: place rank_b * rows + r of its task, whose tiles begin at before_b

Two launches; in each a program takes BLOCK_B rows and compares them with all rows of the batch: comparisons are cheap,
a sort and the dozens of small operators around it are not.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefix_attn.kernels.config import cdiv
from prefix_attn.kernels.direct_launch import Launcher
from prefix_attn.kernels.early_launch import early_options, let_next_begin, wait_for_previous
from prefix_attn.kernels.launch import LAUNCH_OPTIONS, LAYOUTS
from prefix_attn.kernels.primitives import runtime_jit

#: Rows of a program, rows that they are compared with at once, and query rows that it writes at once.
BLOCK_B, BLOCK_J, BLOCK_R = 16, 256, 16


@triton.jit
def planned_task(b, batch, num_tasks, task_ids_ptr, lens_ptr, stride_task_ids):
    """The task in whose tiles row b is; -1 for a row in none, and -2 behind the last row."""
    task = tl.load(task_ids_ptr + b.to(tl.int64) * stride_task_ids, mask=b < batch, other=-1)
    known = (task >= 0) & (task < num_tasks)
    task = tl.where(known, task, 0).to(tl.int32)
    shared = known & (tl.load(lens_ptr + task, mask=known, other=0) > 0)
    return tl.where(b < batch, tl.where(shared, task, -1), -2)


@runtime_jit
def rank_kernel(
    task_ids_ptr, lens_ptr, planned_ptr, ranks_ptr, sizes_ptr,
    stride_task_ids, batch, num_tasks,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``planned[b]``, ``ranks[b]`` and ``sizes[b]`` of BLOCK_B rows b."""
    wait_for_previous(EARLY)
    let_next_begin(EARLY)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    task = planned_task(b, batch, num_tasks, task_ids_ptr, lens_ptr, stride_task_ids)  # [BLOCK_B]
    rank = tl.zeros([BLOCK_B], tl.int32)
    size = tl.zeros([BLOCK_B], tl.int32)
    for start in tl.range(0, batch, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)  # [BLOCK_J]
        other = planned_task(j, batch, num_tasks, task_ids_ptr, lens_ptr, stride_task_ids)  # [BLOCK_J]
        same = task[:, None] == other[None, :]  # [BLOCK_B, BLOCK_J]
        size += tl.sum(same.to(tl.int32), 1)
        rank += tl.sum((same & (j[None, :] < b[:, None])).to(tl.int32), 1)
    tl.store(planned_ptr + b, task, mask=b < batch)
    tl.store(ranks_ptr + b, rank, mask=b < batch)
    tl.store(sizes_ptr + b, size, mask=b < batch)


@runtime_jit
def members_kernel(
    planned_ptr, ranks_ptr, sizes_ptr, tasks_ptr, members_ptr,
    batch, rows, tiles,
    TILE_ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``tasks`` and ``members`` of the tiles that the query rows of BLOCK_B rows are in."""
    wait_for_previous(EARLY)
    let_next_begin(EARLY)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B], as the next four
    task = tl.load(planned_ptr + b, mask=b < batch, other=-1)
    rank = tl.load(ranks_ptr + b, mask=b < batch, other=0)
    size = tl.load(sizes_ptr + b, mask=b < batch, other=0)
    before = tl.zeros([BLOCK_B], tl.int32)
    used = tl.full([], 0, tl.int32)
    for start in tl.range(0, batch, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)  # [BLOCK_J], as the next two
        other = tl.load(planned_ptr + j, mask=j < batch, other=-1)
        first = (tl.load(ranks_ptr + j, mask=j < batch, other=1) == 0) & (other >= 0)
        theirs = tl.where(first, tl.cdiv(tl.load(sizes_ptr + j, mask=first, other=0) * rows, TILE_ROWS), 0)
        before += tl.sum(tl.where(other[None, :] < task[:, None], theirs[None, :], 0), 1)
        used += tl.sum(theirs)

    for start in tl.range(0, rows, BLOCK_R):
        r = (start + tl.arange(0, BLOCK_R))[None, :]  # [1, BLOCK_R]
        place = before[:, None] * TILE_ROWS + rank[:, None] * rows + r  # [BLOCK_B, BLOCK_R]
        mask = (task >= 0)[:, None] & (r < rows)
        tl.store(members_ptr + place, b[:, None] * rows + r, mask=mask)
        tl.store(tasks_ptr + place // TILE_ROWS, task[:, None].broadcast_to(place.shape),
                 mask=mask & (place % TILE_ROWS == 0))  # fmt: skip
    # The last row of a task marks the rest of the task's last tile as empty.
    rest = tl.arange(0, TILE_ROWS)[None, :]  # [1, TILE_ROWS]
    place = (size * rows)[:, None] + rest  # [BLOCK_B, TILE_ROWS]
    last = ((task >= 0) & (rank == size - 1))[:, None] & (place < tl.cdiv(size * rows, TILE_ROWS)[:, None] * TILE_ROWS)
    tl.store(members_ptr + before[:, None] * TILE_ROWS + place, tl.full(place.shape, -1, tl.int32), mask=last)
    # The tiles that are left over are empty.
    nobody = tl.full([BLOCK_J], -1, tl.int32)
    first_left = used * TILE_ROWS + tl.program_id(0) * BLOCK_J
    for start in tl.range(first_left, tiles * TILE_ROWS, tl.num_programs(0) * BLOCK_J):
        left = start + tl.arange(0, BLOCK_J)  # [BLOCK_J]
        mask_left = left < tiles * TILE_ROWS
        tl.store(members_ptr + left, nobody, mask=mask_left)
        tl.store(tasks_ptr + left // TILE_ROWS, nobody, mask=mask_left & (left % TILE_ROWS == 0))


def row_tiles(task_ids: Tensor, lens: Tensor, rows: int, tile_rows: int, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(planned, tasks, members)`` of `prefix_attn.plan.RowTiles`.

    Args:
        task_ids: integer ``[batch]``, any stride, at least one; lens: int32 ``[tasks]``.
        rows: query rows of each row of the batch.
        tile_rows: query rows of a tile; a power of two.
        tiles: length of the table, at least as many as can be used.
    """
    launch = _launch(task_ids.shape[0], task_ids.stride(0), lens.shape[0], rows, tile_rows, tiles, task_ids.device)
    planned, ranks, sizes = (task_ids.new_empty(task_ids.shape, dtype=torch.int32) for _ in range(3))
    tasks = planned.new_empty(tiles)
    members = planned.new_empty((tiles, tile_rows))
    launch.rank(rank_kernel, {
        "task_ids_ptr": task_ids, "lens_ptr": lens.contiguous(), "planned_ptr": planned, "ranks_ptr": ranks,
        "sizes_ptr": sizes,
    })  # fmt: skip
    launch.members(members_kernel, {
        "planned_ptr": planned, "ranks_ptr": ranks, "sizes_ptr": sizes, "tasks_ptr": tasks, "members_ptr": members,
    })  # fmt: skip
    return planned, tasks, members


class _Launch(NamedTuple):
    rank: Launcher
    members: Launcher


@lru_cache(maxsize=LAYOUTS)
def _launch(
    batch: int, stride: int, num_tasks: int, rows: int, tile_rows: int, tiles: int, device: torch.device
) -> _Launch:
    """The two launches but for their tensors."""
    common = {
        "batch": batch, "BLOCK_B": BLOCK_B, "BLOCK_J": BLOCK_J, "num_warps": 4,
        **early_options(device), **LAUNCH_OPTIONS,
    }  # fmt: skip
    programs = cdiv(batch, BLOCK_B)
    return _Launch(
        Launcher(programs, {"stride_task_ids": stride, "num_tasks": num_tasks, **common}),
        Launcher(programs, {"rows": rows, "tiles": tiles, "TILE_ROWS": tile_rows, "BLOCK_R": BLOCK_R, **common}),
    )
