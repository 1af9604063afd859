"""Into how many chunks the keys of a program are cut, so that a GPU is filled and no multiprocessor is left over.

The unit of time is that of a tile of keys, on a multiprocessor whose share of memory, or of the L2 cache, is used up.
One program nearly does that, and is bound by latency; each further one takes its own time. So a wave of programs lasts
as long as the fullest multiprocessor has programs, times the tiles of each; a partial wave at the end falls unevenly on
the multiprocessors. More chunks cost what joins them.
(Fitted to sweeps on an H200: kernels/README.md.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from prefix_attn.kernels.config import TileConfig, multiprocessors, resident
from prefix_attn.kernels.launch import cdiv

#: Chunks at most: what joins them holds one number per chunk and output element of a row in registers.
MAX_CHUNKS = 64

#: How much longer a tile takes on a multiprocessor that has nothing else to do while it waits.
ALONE = 1.1

#: What it costs to begin and end a program, in tiles of its own, and what the uneven end of several waves costs.
START, UNEVEN = 1.5, 1.0


class Residency(NamedTuple):
    """The multiprocessors of a GPU, and how many programs of a kernel one of them runs at once."""

    multiprocessors: int
    programs: int

    @classmethod
    def of(cls, kind: str, config: TileConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> Residency:
        return cls(multiprocessors(device), resident(kind, config, head_dim, dtype.itemsize, device))

    def waves(self, programs: int) -> float:
        """How long so many programs of one tile each take, in tiles."""
        slots = self.multiprocessors * self.programs
        if programs <= self.multiprocessors:
            return ALONE
        whole, rest = divmod(programs, slots)
        return self.programs * whole + cdiv(rest, self.multiprocessors) + (UNEVEN if whole else 0)


def choose_chunks(programs: int, tiles: int, at_once: Residency, merge_tiles: float, chunk_tiles: float = 0.0) -> int:
    """The fewest chunks with which ``programs`` programs of ``tiles`` tiles each are done soonest.

    Args:
        merge_tiles: what it costs to have more than one chunk; chunk_tiles: and each of them; in the time of a tile.
    """

    def cost(chunks: int) -> float:
        joined = merge_tiles * (chunks > 1) + chunk_tiles * chunks
        return at_once.waves(programs * chunks) * (cdiv(tiles, chunks) + START) + joined

    return min(range(1, max(1, min(MAX_CHUNKS, cdiv(tiles, 2))) + 1), key=cost)
