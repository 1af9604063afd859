"""Prefill: every row of a padded, mixed batch as if it were alone; tiles nobody sees are skipped; short prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefix_attn import regime
from prefix_attn.backends import reference
from prefix_attn.checks import checked_call
from prefix_attn.kernels import decode, prefill, primitives
from prefix_attn.kernels.config import TileConfig
from prefix_attn.types import AttentionCall
from tests.cases import Case, make
from tests.kernels.calls import DEVICE, TILE, launch
from tests.tolerance import assert_close

#: 64 query rows are 32 queries of two heads.
TILE_64 = TileConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)


@pytest.mark.parametrize("past", [0, 37], ids=["prompt", "chunk of a prompt"])
@pytest.mark.parametrize("window", [None, 45], ids=["", "window"])
@pytest.mark.parametrize("q_len", [1, 2, 31, 32, 33, 63, 64, 65, 128, 129, 255, 300])
def test_a_padded_mixed_batch_equals_each_row_alone(q_len: int, window: int | None, past: int) -> None:
    """Rows with a prefix, with another, with none; padded on the left by less and by more than a tile."""
    pads = (0, q_len // 3, past + q_len - 1)
    case = Case("prefill", prefix_lens=(33, 5), task_ids=(0, 1, -1), q_heads=2, kv_heads=1, q_len=q_len,
                kv_len=q_len + past, starts=pads, window=window)  # fmt: skip
    inputs = make(case, device=DEVICE, seed=q_len)
    call = checked_call(*inputs.args, **inputs.options)
    out, lse = launch(call, "prefill", TILE_64)
    for b in range(3):
        row = call.row(b)
        exact, eager = reference.attend(row, torch.float64), reference.attend(row, torch.float32)
        assert_close(f"out of row {b}", out[b : b + 1], eager[0], exact[0])
        assert_close(f"lse of row {b}", lse[b : b + 1], eager[1], exact[1])


def tiles_loaded(call: AttentionCall, way: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of 16 keys that the programs load for one tile of 16 query rows each."""
    loads = []
    load_keys: Callable[..., Any] = primitives.load_keys

    def counted(*arguments: Any) -> Any:
        loads.append(arguments)
        return load_keys(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(primitives, "load_keys", counted)
        launch(call, way, TILE)
    return len(loads) // 2  # K and V


@pytest.mark.skipif(not primitives.INTERPRETED.value, reason="calls of a compiled kernel cannot be counted")
@pytest.mark.parametrize(
    ("way", "q_len", "window", "start", "tiles"),
    [
        ("decode", 1, None, 0, 4 + 5),  # 64 prefix tokens, 80 own keys
        ("decode", 1, None, 64, 4 + 1),
        ("decode", 1, None, 70, 4 + 1),
        ("decode", 1, 90, 0, 1 + 5),
        ("decode", 1, 30, 0, 2),
        ("prefill", 16, None, 0, 4 + 5),
        ("prefill", 16, None, 64, 4 + 1),
        ("prefill", 16, 16, 0, 2),
        ("prefill", 32, None, 48, 2 * 4 + 1 + 2),  # the first tile of queries sees keys 48 to 63, the second all
        ("prefill", 32, 17, 0, 2 * 2),
    ],
)
def test_padding_windows_and_the_diagonal_skip_tiles(
    way: str, q_len: int, window: int | None, start: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("skip", prefix_lens=(64,), task_ids=(0,), q_heads=1, kv_heads=1, q_len=q_len, kv_len=80,
                starts=(start,), window=window)  # fmt: skip
    inputs = make(case, device=DEVICE)
    assert tiles_loaded(checked_call(*inputs.args, **inputs.options), way, monkeypatch) == tiles


class Grid:
    """A kernel that only notes how many programs it is launched with."""

    def __init__(self) -> None:
        self.programs = 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        self.programs += grid[0]
        return lambda **arguments: None


@pytest.mark.parametrize(("q_heads", "kv_heads", "q_len"), [(32, 32, 16), (32, 8, 16), (32, 8, 17), (32, 32, 65)])
def test_short_prompts_fill_a_machine(q_heads: int, kv_heads: int, q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty prompts give every multiprocessor of an H200 two programs, without a tile of queries from two rows."""
    inputs = make(Case("short", (20,), (0,) * 40, q_heads, kv_heads, q_len, q_len, 16))
    call = checked_call(*inputs.args)
    few = regime.use_decode(q_len, q_heads // kv_heads)
    assert (regime.choose(call).name != "prefill") == few == (q_len == 16)
    grid = Grid()
    module, kernel = (decode, "decode_kernel") if few else (prefill, "prefill_kernel")
    monkeypatch.setattr(module, kernel, grid)
    if few:
        decode.decode_attention(call, torch.empty_like(call.q), None)
    else:
        prefill.prefill_attention(call, torch.empty_like(call.q), None)
    assert grid.programs >= 2 * 132
