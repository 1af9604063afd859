"""Into how many chunks the keys of a program are cut, so that a GPU is filled and no multiprocessor is left over.

The unit of time is what a tile of keys takes when its multiprocessor uses all of its share of the bandwidth of memory,
or of the L2 cache. One program alone takes about that long too, most of it waiting for its loads; each further program
on the multiprocessor adds a unit per tile. So a wave of programs takes the mean number of programs on a multiprocessor,
times the tiles of each. More chunks take longer to merge.
(Fitted to sweeps on an H200: kernels/README.md.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from prefix_attn.kernels.config import TileConfig, cdiv, multiprocessors, resident

#: The most chunks: the merge holds one number per chunk and output element of a row in registers.
MAX_CHUNKS = 64

#: What the beginning and end of a program cost, in tiles of its own, and what the uneven end of several waves costs.
START, UNEVEN = 2.0, 1.0


class Residency(NamedTuple):
    """The multiprocessors of a GPU, and how many programs of a kernel one of them runs at once."""

    multiprocessors: int
    programs: int

    @classmethod
    def of(cls, kind: str, config: TileConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> Residency:
        return cls(multiprocessors(device), resident(kind, config, head_dim, dtype.itemsize, device))

    def waves(self, programs: int) -> float:
        """How long so many programs of one tile each take, in tiles."""
        whole, rest = divmod(programs, self.multiprocessors * self.programs)
        last = max(1.0, rest / self.multiprocessors) if rest else 0.0
        return self.programs * whole + last + (UNEVEN if whole else 0)


def choose_chunks(
    programs: int, tiles: int, at_once: Residency, merge_tiles: float, chunk_tiles: float = 0.0, most: int | None = None
) -> int:
    """The fewest chunks with which ``programs`` programs of ``tiles`` tiles each are done soonest.

    Args:
        merge_tiles, chunk_tiles: what the merge costs, in the time of a tile: once, and for each chunk.
        most: the most chunks; by default as many as have two tiles each.
    """

    def cost(chunks: int) -> float:
        joined = merge_tiles * (chunks > 1) + chunk_tiles * chunks
        return at_once.waves(programs * chunks) * (cdiv(tiles, chunks) + START) + joined

    most = cdiv(tiles, 2) if most is None else most
    return min(range(1, max(1, min(MAX_CHUNKS, most)) + 1), key=cost)
