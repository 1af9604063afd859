"""Tile shapes: explicit > tuned file ``configs/<gpu>.json`` > heuristic.

Explicit is the ``config`` argument of a launcher. Nothing is tuned at run time: a tuned file is made by
benchmarks/tune.py, and while it is not edited every run takes the same tiles.
The heuristic knows a GPU by its compiler target (``sm_90``, ``gfx942``): what spills and what fits its shared memory is
checked without the GPU by benchmarks/compile_report.py. A tuned file knows one GPU by name, and was timed on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

#: Bytes of shared memory one program may take, by target.
SHARED_MEMORY = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_87": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448,
    "sm_103": 232_448, "sm_120": 101_376, "sm_121": 101_376, "gfx942": 65_536, "gfx950": 163_840,
}  # fmt: skip

#: Targets with matrix instructions that read shared memory (wgmma, tcgen05), and much of it.
LARGE_TILES = ("sm_90", "sm_100", "sm_103")


@dataclass(frozen=True)
class TileConfig:
    """BLOCK_M query rows by BLOCK_N keys; warps per program; tiles in flight (of queries in backward_dkv)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up: how many tiles of b there are in a. (Triton's own takes the host microseconds.)"""
    return -(-a // b)


def padded_head_dim(head_dim: int) -> int:
    """The tile width for a head dimension: the next power of two, at least 16; what lies beyond is masked."""
    return max(16, 1 << (head_dim - 1).bit_length())


def edge_keys(block_n: int) -> int:
    """Keys of a masked tile in prefill: at most 64, since a mask needs registers too."""
    return min(block_n, 64)


def decode_rows(rows: int) -> int:
    """Rows of a decode tile: 16 is what the matrix instructions take at least."""
    return min(64, max(16, 1 << (rows - 1).bit_length()))


def slices(block_m: int, block_n: int, num_warps: int, head_dim: int, dtype: torch.dtype) -> int:
    """Into how many slices a decode tile's keys are cut: one for each warp, where the state of all rows fits one's
    registers, or one for all.

    Warps with keys of their own meet only at the end; otherwise at each tile, for the maximum, the sum and the weights.
    """
    fits = block_m == 16 and padded_head_dim(head_dim) <= 128 and dtype.itemsize == 2 and block_n >= 16 * num_warps
    return num_warps if fits else 1


def item_rows(
    block_m: int, block_n: int, num_warps: int, head_dim: int, dtype: torch.dtype, softcap: float | None
) -> int:
    """How many rows a request item of grouped decode has: one for each warp, as `slices`, or one."""
    # A softcap takes the registers that a state for each warp would need.
    return slices(block_m, block_n, num_warps, head_dim, dtype) if softcap is None else 1


@cache
def config_for(kind: str, head_dim: int, dtype: torch.dtype, device: torch.device, rows: int = 0) -> TileConfig:
    """The tuned or heuristic config.

    Args:
        kind: "decode", "decode_few" (where decode.py finds few programs), "prefill", "grouped", "backward_dq" or
            "backward_dkv"; after "biased_" with a relative bias.
        rows: in decode, how many query rows share the keys; in grouped decode, the rows of a prefix tile.
    """
    few = decode_rows(rows)
    block_m = {"decode": few, "decode_few": few, "grouped": rows}.get(kind.removeprefix("biased_"), 0)
    tuned = tuned_configs(device).get(tuned_key(kind, head_dim, dtype, block_m))
    return tuned or heuristic(kind, head_dim, dtype.itemsize, target_of(device), block_m)


def heuristic(kind: str, head_dim: int, itemsize: int, target: str, block_m: int = 16) -> TileConfig:
    """A config that neither spills nor overflows shared memory on ``target``; see the compile report."""
    config = _shape(kind, padded_head_dim(head_dim), itemsize, target, block_m)
    streamed = "block_m" if kind.endswith("backward_dkv") else "block_n"
    if itemsize == 2 and not target.startswith("gfx"):  # a thread loads 16 bytes of a tile at once
        least = 16 * 32 * config.num_warps // (itemsize * padded_head_dim(head_dim))
        config = replace(config, **{streamed: max(getattr(config, streamed), least)})
    limit = shared_limit(target)
    while config.num_stages > 1 and shared_bytes(kind, config, head_dim, itemsize, target) > limit:
        config = replace(config, num_stages=config.num_stages - 1)
    while getattr(config, streamed) > 16 and shared_bytes(kind, config, head_dim, itemsize, target) > limit:
        config = replace(config, **{streamed: getattr(config, streamed) // 2})
    return config


def shared_limit(target: str) -> int:
    """Bytes of shared memory one program may take; for an unknown target, what every GPU since 2020 has."""
    return SHARED_MEMORY.get(target, 65_536 if target.startswith("gfx") else 101_376)


def shared_bytes(kind: str, config: TileConfig, head_dim: int, itemsize: int, target: str) -> int:
    """An upper estimate of a program's shared memory: two tiles a stage in flight (K and V, or q and dout), and what
    stays (q; q and dout; K and V).

    On AMD GPUs what stays is in registers, and so is the stage that is being loaded.
    """
    amd = target.startswith("gfx")
    stages = max(1, config.num_stages - 1) if amd else config.num_stages
    streamed, staying = config.block_n, config.block_m
    if kind.endswith("backward_dkv"):
        streamed, staying = staying, streamed
    rows = 2 * stages * streamed + (0 if amd else staying * (2 if "backward" in kind else 1))
    return rows * padded_head_dim(head_dim) * itemsize + 1024


def _shape(kind: str, block_d: int, itemsize: int, target: str, block_m: int) -> TileConfig:
    amd, large = target.startswith("gfx"), target in LARGE_TILES
    # Distances and entries of a relative bias take the registers of half a tile.
    biased, kind = kind.startswith("biased_"), kind.removeprefix("biased_")
    if kind == "grouped":
        return _grouped_shape(block_d, itemsize, amd, large, block_m, biased)
    if kind in ("backward_dq", "backward_dkv"):
        return _backward_shape(kind, block_d, itemsize, amd, large, biased)
    if itemsize == 4:  # full float32 products run on the ordinary cores, where tiles only cost registers
        if kind.startswith("decode"):
            if biased and block_d <= 128:
                return TileConfig(min(block_m, 32), 16, 4, 2)
            return TileConfig(min(block_m, 32), 32 if block_d <= 128 else 16, 8, 2)
        return TileConfig(32, 32 if biased else 64, 8, 1) if block_d <= 128 else TileConfig(16, 32, 8, 2)
    many = kind == "decode" or (kind == "decode_few" and block_d == 64)
    if many and block_m == 16 and block_d in (64, 128) and not amd:
        # Six to nine programs a multiprocessor: one's start and end are hidden behind the others' loads, and the last
        # wave is short. Up to 23% faster on an H200 than the larger tiles below (41% at D = 64), 1% slower at worst.
        return TileConfig(16, 32, 2, 3 if block_d == 128 else 4)
    if kind.startswith("decode"):
        # 16 KiB of keys and 16 KiB of values a stage: enough in flight from one program a multiprocessor. Tiles of
        # 64 rows get wgmma where there is wgmma; elsewhere they need the registers of half the keys.
        block_n = min(64 if block_m == 64 else 128, 4 * block_d, max(32, 8192 // block_d))
        if block_m == 64 and (biased or not large):
            block_n = min(block_n, 16 if biased and block_d >= 128 else 32)
        return TileConfig(block_m, block_n, 4 if block_m <= 32 or block_d <= 128 else 8, 2 if amd else 3)
    if amd:
        return TileConfig(128, 64, 4, 1) if block_d <= 128 else TileConfig(64, 32, 4, 1)
    # Fewer than three stages load nothing during the products.
    if block_d <= 32:
        return TileConfig(64 if biased else 128, 64, 4, 3)
    if block_d == 128 and target == "sm_90" and not biased:
        # Two programs a multiprocessor, each with one group of warps for wgmma: one multiplies while the other's
        # exponentials are computed. 5 to 13% faster on an H200 than 128 rows and 128 keys.
        return TileConfig(64, 64, 4, 3)
    if block_d <= 128:
        block_n = 128 if block_d == 64 or large else 64
        return TileConfig(128, block_n // 2 if biased else block_n, 8, 3)
    return TileConfig(128 if large and not biased else 64, 32, 8, 3)


def _grouped_shape(block_d: int, itemsize: int, amd: bool, large: bool, rows: int, biased: bool) -> TileConfig:
    """Key tiles and warps of both kinds of work items; the rows are those of a plan's tiles."""
    if itemsize == 4:
        # Larger key tiles, or two stages, spill on sm_90.
        return TileConfig(rows, 16, 4 if biased and block_d <= 32 else 8, 1)
    if block_d > 128:
        return TileConfig(rows, 32, 8, 2 if amd else 3)
    if block_d <= 32:
        return TileConfig(rows, 32 if biased else 64, 4, 2 if amd else 3)
    if biased and block_d == 128 and not amd:
        return TileConfig(rows, 32, 8, 3)
    if amd:
        return TileConfig(rows, 32, 4, 2)
    # Without wgmma, four warps would spill.
    return TileConfig(rows, 64, 4, 3) if large else TileConfig(rows, 32, 8, 3)


def _backward_shape(kind: str, block_d: int, itemsize: int, amd: bool, large: bool, biased: bool) -> TileConfig:
    """dq keeps query rows and one accumulator; dkv keeps keys and two, hence smaller tiles.

    In float32 eight warps would spill a few bytes where heads are narrow, four where there is a bias.
    """
    if kind == "backward_dq":
        if itemsize == 4:
            return TileConfig(32, 16, 4 if block_d <= 64 and not (amd or biased) else 8, 1)
        if amd:
            return TileConfig(128, 32, 4, 1) if block_d <= 128 else TileConfig(64, 32, 4, 1)
        if block_d <= 32:
            return TileConfig(64, 64, 4, 3)
        if block_d == 64:
            return TileConfig(128, 64 if large or not biased else 32, 8, 3)
        if block_d == 128:
            return TileConfig(128 if large or not biased else 64, 64 if large else 32, 8, 3)
        return TileConfig(64, 32, 8, 3)
    if itemsize == 4:
        return TileConfig(16, 32, 8, 1) if amd else TileConfig(32, 16, 4 if block_d <= 64 and not biased else 8, 1)
    if block_d > 128:
        return TileConfig(32, 32, 4 if amd else 8, 1 if amd else 3)
    if amd:
        return TileConfig(32, 64, 4, 1)
    if block_d <= 64:
        return TileConfig(32, 64 if large or not biased else 32, 4, 3)
    return TileConfig(32, 128 if large else 64, 8, 3)


@cache
def target_of(device: torch.device) -> str:
    """The compiler target of a device; on a CPU, where kernels are interpreted, that of a small GPU."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; on a CPU, where kernels are interpreted, a few."""
    return 4 if device.type != "cuda" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def resident(kind: str, config: TileConfig, head_dim: int, itemsize: int, device: torch.device) -> int:
    """Programs of a kernel that a multiprocessor runs at once, by shared memory and 128 registers a thread.

    Matrix instructions that read registers (tiles of fewer than 64 rows) need one stage less in shared memory.
    """
    target = target_of(device)
    if config.block_m < 64 and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    # Each program takes 1 KiB more than it asks for, which the limit of one program leaves room for.
    by_shared = (shared_limit(target) + 1024) // (shared_bytes(kind, config, head_dim, itemsize, target) + 1024)
    return max(1, min(by_shared, 16 // config.num_warps))


@cache
def tuned_configs(device: torch.device) -> dict[str, TileConfig]:
    """What ``configs/<gpu>.json`` says: ``{"kind/block_d/dtype/block_m": {"block_m": .., "block_n": .., ...}}``."""
    if device.type != "cuda" or not (path := tuned_file(device)).is_file():
        return {}
    return {key: TileConfig(**value) for key, value in json.loads(path.read_text()).items()}


def tuned_file(device: torch.device) -> Path:
    """Where the tuned configs of a GPU are, or would be."""
    gpu = torch.cuda.get_device_name(device).lower().replace(" ", "_")
    return Path(__file__).parent / "configs" / f"{gpu}.json"


def tuned_key(kind: str, head_dim: int, dtype: torch.dtype, block_m: int) -> str:
    """A config's name in the tuned file; block_m as in `heuristic`."""
    return f"{kind}/{padded_head_dim(head_dim)}/{str(dtype).removeprefix('torch.')}/{block_m}"
