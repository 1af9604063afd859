"""The time a kernel should take on an H200, from what one config moves and computes at a stated problem.

    time = max(memory / 4.3e12, cache / 8e12, FLOPs / rate, 2.5 us)

memory: bytes that must cross the memory bus, each shared prefix once. cache: bytes that programs load through the L2
cache, once per tile of queries that reads them. FLOPs: those the tiles execute, padding and masked pairs included.
Nothing here was measured for this; what occupancy, latency and the exponentials add is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prefix_attn.cost import ROOFS
from prefix_attn.kernels.config import decode_rows, edge_keys, padded_head_dim

from .peers.problem import Point

H200 = ROOFS["NVIDIA H200"]

#: FLOP/s of an H200's ordinary cores in float32, from its data sheet: there the matrix units are not used.
FLOAT32_RATE = 67e12

#: Bytes a second through the L2 cache; prefill has been seen to take 7.9e12.
CACHE_RATE = 8e12

LAUNCH_US = 2.5

#: One problem per kernel, from the grid of the GPU benchmark; the merge joins what decode leaves in 8 chunks.
PROBLEMS = {
    "decode": Point("decode", batch=64, tasks=8, m=128, n=512),
    "grouped": Point("decode", batch=64, tasks=1, m=8192, n=512),
    "merge": Point("decode", batch=64, tasks=1, m=8192, n=512),
    "prefill": Point("prefill", batch=16, tasks=8, m=1024, n=2048),
}
MERGED_CHUNKS = 8


@dataclass(frozen=True)
class Work:
    """Bytes over the memory bus, bytes through the L2 cache, and FLOPs."""

    memory: float
    cache: float
    flops: float

    def time(self, float32: bool = False) -> tuple[float, str]:
        """Microseconds on an H200, and what bounds them."""
        rate = FLOAT32_RATE if float32 else H200.flops_per_s
        times = {
            "memory": 1e6 * self.memory / H200.bytes_per_s,
            "cache": 1e6 * self.cache / CACHE_RATE,
            "FLOPs": 1e6 * self.flops / rate,
            "launch": LAUNCH_US,
        }
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound


def predict(kernel: str, head_dim: int, dtype: str, group: int, rows: int, config: dict[str, int]) -> Work | None:
    """The work of ``kernel`` with ``config`` at its problem, with 8 kv heads of ``group`` query heads each.

    ``rows`` are the query rows per kv head in decode, of which more than the group means more queries. None for a
    kernel without a problem.
    """
    if kernel not in PROBLEMS:
        return None
    p = replace(PROBLEMS[kernel], head_dim=head_dim, dtype=dtype, q_heads=8 * group)
    rows = p.n * group if p.op == "prefill" else max(rows, group)
    element = 4 if dtype == "float32" else 2
    key, queries = 2 * element * head_dim, 2 * element * head_dim * p.batch * p.kv_heads * rows  # K+V; q and out
    floor = key * p.kv_heads * (p.tasks * p.m + p.batch * p.n) + queries
    partials = 4 * (head_dim + 1) * p.batch * p.kv_heads * rows  # float32, of one chunk
    if kernel == "merge":
        return Work(MERGED_CHUNKS * partials + queries / 2, MERGED_CHUNKS * partials, 0)

    block_n = config["block_n"]
    if kernel != "decode":
        block_n = edge_keys(block_n)  # of the tiles at the ends
    prefix, own = (-(-x // block_n) * block_n for x in (p.m, p.n))  # keys in whole tiles
    pair = 4 * padded_head_dim(head_dim) * p.kv_heads  # FLOPs of a query row and a key, on all kv heads
    if kernel == "grouped":
        tiles = p.tasks * -(-(p.batch // p.tasks) * rows // config["block_m"])
        cache = key * p.kv_heads * (tiles * p.m + p.batch * p.n) + queries
        flops = pair * (tiles * config["block_m"] * prefix + p.batch * decode_rows(rows) * own)
        return Work(floor + 2 * partials, cache + 2 * partials, flops)
    query_tiles = -(-rows // config["block_m"])
    if kernel == "decode":
        seen, loaded = query_tiles * (prefix + own), query_tiles * (p.m + p.n)
    else:  # a tile's last query sees the keys up to its own
        ends = [min(p.n, (t + 1) * config["block_m"] // group) for t in range(query_tiles)]
        seen, loaded = sum(prefix + -(-end // block_n) * block_n for end in ends), sum(p.m + end for end in ends)
    return Work(floor, p.batch * p.kv_heads * key * loaded + queries, pair * p.batch * config["block_m"] * seen)
