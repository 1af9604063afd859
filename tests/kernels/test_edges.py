"""Lengths, windows and paddings that fall on, before and after the edges of tiles and chunks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from prefix_attn.kernels.config import TileConfig
from tests.cases import Case, make
from tests.kernels.calls import DEVICE, TILE, WAYS, check

#: Tiles of which each warp has its own keys, in decode a slice of the tile's, in grouped decode another row's.
WARPED = pytest.mark.parametrize("tile", [TileConfig(16, 64, 4, 2), TileConfig(16, 32, 2, 3)], ids=("four", "two"))

EDGES = (0, 1, 15, 16, 17, 33)
WAY = pytest.mark.parametrize("way", WAYS)


@WAY
@pytest.mark.parametrize("kv_len", EDGES)
def test_own_keys_around_tile_edges(way: str, kv_len: int) -> None:
    check(make(Case("edge", prefix_lens=(15, 16, 17), task_ids=(0, 1, 2), kv_len=kv_len), device=DEVICE), way)


@WAY
@pytest.mark.parametrize("m", EDGES)
def test_prefix_around_tile_edges(way: str, m: int) -> None:
    check(make(Case("edge", prefix_lens=(5, m, 3), task_ids=(1, -1), kv_len=18, q_len=3), device=DEVICE), way)


@WAY
@pytest.mark.parametrize("q_len", [15, 17, 33])
@pytest.mark.parametrize("group", [1, 3])
def test_queries_around_tile_edges(way: str, q_len: int, group: int) -> None:
    case = Case("edge", task_ids=(2, 1), q_heads=group, kv_heads=1, q_len=q_len, kv_len=q_len + 4)
    check(make(case, device=DEVICE), way)


@WAY
@pytest.mark.parametrize("window", [1, 16, 17, 40, 60])
def test_windows_around_tile_edges(way: str, window: int) -> None:
    case = Case("edge", prefix_lens=(20, 33), task_ids=(1, 0, 1), q_heads=2, q_len=18, kv_len=35, window=window,
                starts=(0, 3, 17))  # fmt: skip
    check(make(case, device=DEVICE), way)


@WAY
@pytest.mark.parametrize("start", [15, 17, 35])
def test_left_padding_around_tile_edges(way: str, start: int) -> None:
    case = Case("edge", task_ids=(2, -1), q_heads=2, q_len=18, kv_len=35, starts=(start, 0))
    check(make(case, device=DEVICE), way)


@WAY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "window": 20}, {"sinks": True, "reach": 11}], ids=str)
def test_sixteen_bits(way: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    check(make(replace(Case("sixteen", q_len=9, kv_len=40), **options), dtype, DEVICE), way)


@WAY
@pytest.mark.parametrize("scale", [-0.4, -0.0, 0.0])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"reach": 9}], ids=str)
def test_scales_that_are_not_positive(way: str, scale: float, options: dict[str, float]) -> None:
    case = Case("scale", q_len=4, scale=scale, starts=(0, 2, 0, 13))
    check(make(replace(case, **options), device=DEVICE), way)  # type: ignore[arg-type]


@WAY
def test_a_negative_scale_with_q_cut_from_a_fused_projection(way: str) -> None:
    """The sign goes to a copy of q, whose strides are not q's."""
    inputs = make(Case("fused", q_len=3, scale=-0.4), device=DEVICE)
    fused = torch.stack([inputs.q, torch.full_like(inputs.q, float("nan"))], dim=1)
    check(replace(inputs, q=fused[:, 0]), way)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's, of the lowest number
@WAY
@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_bias_may_hide_keys(way: str, hidden: float, softcap: float | None) -> None:
    """All far ones, which fill tiles, and for a head every key."""
    case = Case("bias", q_len=9, kv_len=40, prefix_lens=(70, 0, 100), reach=20, softcap=softcap)
    inputs = make(case, device=DEVICE)
    bias = inputs.options["relative_bias"]
    bias[:, :11] = hidden
    bias[1] = -math.inf
    check(inputs, way)


@WAY
def test_head_dims_that_fill_no_tile(way: str) -> None:
    for head_dim in (17, 24, 72):
        check(make(Case("head_dim", q_len=2, head_dim=head_dim, task_ids=(2, 0)), device=DEVICE), way)


@pytest.mark.parametrize("count", [15, 16, 17])
@pytest.mark.parametrize("options", [{}, {"window": 70, "q_len": 2}, {"reach": 50, "q_len": 2}], ids=str)
def test_gathered_rows_around_tile_edges(count: int, options: dict[str, int]) -> None:
    """Rows of two tasks in turn, and one without; with the window each row sees other slots of the prefix, with the
    bias from other distances."""
    case = Case("gathered", prefix_lens=(64, 65), task_ids=(1, 0) * count + (-1,), q_heads=1, kv_heads=1, kv_len=9,
                ends=tuple(3 + b % 7 for b in range(2 * count + 1)))  # fmt: skip
    check(make(replace(case, **options), device=DEVICE), "grouped")


@pytest.mark.parametrize("m", [64, 65, 129])
def test_prefix_around_chunk_edges(m: int) -> None:
    """Two chunks take at least four tiles of 16 keys each."""
    check(make(Case("chunk", prefix_lens=(3, m), task_ids=(1, 0, 1), kv_len=70), device=DEVICE), "grouped")


@pytest.mark.parametrize("way", ["prefill", "grouped"])
@pytest.mark.parametrize("window", [None, 150, 290])
@pytest.mark.parametrize("own", [63, 64, 65, 192, 320])
def test_edges_in_narrower_tiles_than_the_rest(own: int, window: int | None, way: str) -> None:
    """Tiles of 128 keys where all queries see all of them, of 64 at both ends; prefixes that end in either, and in the
    second chunk of grouped decode."""
    case = Case("narrow", prefix_lens=(127, 193, 700), task_ids=(0, 1, -1, 2), q_heads=2, kv_heads=1, q_len=18,
                kv_len=own, starts=(0, 45, 1, 0), window=window)  # fmt: skip
    check(make(case, device=DEVICE), way, replace(TILE, block_n=128))


@WARPED
@pytest.mark.parametrize("way", ["decode", "decode_split", "grouped"])
@pytest.mark.parametrize("n", [0, 1, 16, 17, 33, 63, 64, 65, 130])
def test_own_keys_and_prefixes_around_the_edges_of_warps(way: str, n: int, tile: TileConfig) -> None:
    """Five rows are no multiple of the warps; one is without prefix, and all but one end before the last key."""
    case = Case("warps", prefix_lens=(n, 40, 3), task_ids=(0, -1, 1, 0, 2), q_heads=4, kv_heads=2, kv_len=n + 20,
                ends=(n + 20, n, max(n - 1, 0), min(n, 3), n))  # fmt: skip
    check(make(case, torch.bfloat16, DEVICE), way, tile)


@WARPED
@pytest.mark.parametrize("way", ["decode", "decode_split", "grouped"])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 1}, {"window": 20}, {"window": 50, "softcap": 3.0}, {"reach": 11, "sinks": True}, {"causal": False},
     {"head_dim": 24, "starts": (0, 5, 70, 16, 33)}, {"q_len": 9}],
    ids=str,
)  # fmt: skip
def test_options_with_keys_of_a_warp(way: str, options: dict[str, object], tile: TileConfig) -> None:
    case = Case("warps", prefix_lens=(70, 0, 33), task_ids=(0, 1, 2, -1, 0), q_heads=4, kv_heads=2, q_len=3, kv_len=75)
    check(make(replace(case, **options), torch.bfloat16, DEVICE), way, tile)  # type: ignore[arg-type]


def test_default_tiles() -> None:
    """The shipped configs, not the small tiles of this file, over several of their tiles."""
    from prefix_attn.kernels.config import config_for

    case = Case("defaults", prefix_lens=(150, 70), task_ids=(0, 1), q_heads=2, q_len=70, kv_len=200)
    inputs = make(case, device=DEVICE)
    for way in WAYS:
        kind, q = way.removesuffix("_split"), inputs.q
        check(inputs, way, config_for(kind, q.shape[3], q.dtype, q.device, rows=64))


def test_several_tiles_of_gathered_rows() -> None:
    """144 query rows of one task in tiles of the shipped config, and 16 of another."""
    from prefix_attn.kernels.config import config_for

    case = Case("several", prefix_lens=(70, 20), task_ids=(0,) * 9 + (1,), q_heads=4, kv_heads=1, q_len=4, kv_len=9)
    inputs = make(case, torch.bfloat16, DEVICE)
    check(inputs, "grouped", config_for("grouped", inputs.q.shape[3], inputs.q.dtype, inputs.q.device, rows=64))
