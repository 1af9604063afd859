"""Which rows of a batch share which prefix, as grouped decode needs to know; computed on the device.

A row has ``rows`` query rows per kv head: its q_len queries times the group's heads. The query rows of all batch rows
of a task, side by side, are cut into tiles of ``tile_rows``; every tile attends to its task's prefix once. Shapes are
those of the worst case, ``ceil(batch * rows / tile_rows) + min(batch, tasks) - 1`` tiles, whatever the ids are: the
plan needs no synchronisation, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.errors import BackendUnavailable
from prefix_attn.kernels.device import device_of, refusal_on

#: Query rows of a tile: the fewest that take the wide matrix instructions (wgmma) of sm_90. Twice as many would halve
#: the reads of the prefix, but have a multiprocessor to themselves: slower at every point of a sweep on an H200.
TILE_ROWS = 64

_ROW_TILES = "prefix_attn::row_tiles"
torch.library.define(
    _ROW_TILES,
    "(Tensor task_ids, Tensor lens, SymInt rows, SymInt tile_rows, SymInt tiles) -> "
    "(Tensor planned, Tensor tasks, Tensor members)",
)


class RowTiles(NamedTuple):
    """Tiles of query rows, gathered by task.

    Attributes:
        planned: int32 ``[batch]``; the task in whose tiles a row is; -1 for a row in none (no task, an empty prefix, or
            an id that is an error).
        tasks: int32 ``[tiles]``; the task of each tile; -1 for a tile that is not used.
        members: int32 ``[tiles, tile_rows]``; ``b * rows + r`` for query row r of batch row b; -1 for none.
    """

    planned: Tensor
    tasks: Tensor
    members: Tensor


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Which rows of one batch share a prefix; `PrefixBank.plan` makes one for all layers and steps.

    Tiles are computed once, when a kernel first needs them. Where a plan no longer fits the batch's task ids or the
    bank, the rows that it gets wrong become NaN.

    A plan made during the capture of a CUDA graph, or in compiled code, is part of that graph and follows the task ids
    of each replay. A plan from outside gives the graph the tiles it has, which do not follow the ids and must outlive
    the graph; if it has none yet, each layer computes them, since what a graph records holds nothing before it runs.

    Attributes:
        task_ids: integer ``[batch]``; -1 for a row without prefix.
        lens: int32 ``[tasks]``, as in `PrefixKV`.
        distinct: how many tasks the rows have, where the host knows; only the choice of a regime depends on it.
    """

    task_ids: Tensor
    lens: Tensor
    distinct: int | None = None
    _recorded: bool = field(init=False, repr=False)
    _tiles: dict[int, RowTiles] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_recorded", recording(self.task_ids))

    def tiles(self, rows: int) -> RowTiles:
        """The tiles for ``rows`` query rows per batch row and kv head; computed on the device, at the first call."""
        now = recording(self.task_ids)
        if rows in self._tiles and (now or not self._recorded):
            return self._tiles[rows]
        # Kept tiles serve training too, which cannot save tensors that were made in the inference mode.
        with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
            tiles = row_tiles(self.task_ids, self.lens, rows)
        if now == self._recorded:
            self._tiles[rows] = tiles
        return tiles


def recording(tensor: Tensor) -> bool:
    """Whether what is computed from ``tensor`` now goes into a graph that runs later: a CUDA graph or a compiler's."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def most_tiles(batch: int, tasks: int, rows: int, tile_rows: int = TILE_ROWS) -> int:
    """Tiles that ``batch`` rows of up to ``tasks`` tasks can take; the table's length."""
    groups = min(batch, tasks)
    return min(-(-batch * rows // tile_rows) + groups - 1, batch * -(-rows // tile_rows)) if groups else 0


def row_tiles(task_ids: Tensor, lens: Tensor, rows: int, tile_rows: int = TILE_ROWS) -> RowTiles:
    """Gather ``rows`` query rows per batch row by task and cut them into tiles; one operator, two launches."""
    batch, tasks, device = task_ids.shape[0], lens.shape[0], task_ids.device
    count = most_tiles(batch, tasks, rows, tile_rows)
    if count == 0:
        nobody = torch.full((batch,), -1, dtype=torch.int32, device=device)
        return RowTiles(nobody, nobody.new_empty(0), nobody.new_empty((0, tile_rows)))
    return RowTiles(*torch.ops.prefix_attn.row_tiles(task_ids, lens, rows, tile_rows, count))


@torch.library.impl(_ROW_TILES, ("cpu", "cuda"))
def _row_tiles(task_ids: Tensor, lens: Tensor, rows: int, tile_rows: int, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    why_not = refusal_on(task_ids.device)
    if why_not is not None:
        raise BackendUnavailable(f"a plan is made by and for Triton's kernels, but {why_not}")
    from prefix_attn.kernels import row_tiles as kernels

    with device_of(task_ids):
        return kernels.row_tiles(task_ids, lens, rows, tile_rows, tiles)


def _row_tiles_fake(
    task_ids: Tensor, lens: Tensor, rows: int, tile_rows: int, tiles: int
) -> tuple[Tensor, Tensor, Tensor]:
    planned = task_ids.new_empty(task_ids.shape, dtype=torch.int32)
    return planned, planned.new_empty((tiles,)), planned.new_empty((tiles, tile_rows))


torch.library.register_fake(_ROW_TILES, _row_tiles_fake)
