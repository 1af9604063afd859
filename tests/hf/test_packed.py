"""How the requests of a step are gathered into padded batches."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from prefix_attn.hf.packed import SHORT, PackedRequest, PackedRows


def padding(*requests: tuple[int, int]) -> list[tuple[int, int]]:
    """(key slots, keys) of each group of requests, given as (tokens seen before, query tokens)."""
    packed = [PackedRequest(-1, past, q_len) for past, q_len in requests]
    rows = PackedRows(packed, torch.zeros(0, dtype=torch.int32), SimpleNamespace())
    groups = rows._grouped(None, torch.device("cpu"))
    return [(group.keys.numel(), int(group.kv_len.sum())) for group in groups]


def test_a_long_request_is_no_padding_for_short_ones() -> None:
    """Else every row would take the memory, and the time, of the longest."""
    alike = padding(*[(20, 1)] * 100, (16_000, 1))
    assert sorted(alike) == [(2100, 2100), (16_001, 16_001)]
    alike = padding(*[(past, 1) for past in range(0, 5000, 7)], *[(past, 3) for past in range(300, 3000, 11)])
    assert all(slots <= 2 * keys or slots <= SHORT * SHORT for slots, keys in alike)
    assert len(alike) == 6 + 4


def test_short_requests_are_one_group() -> None:
    assert len(padding(*[(past, 1) for past in range(SHORT)])) == 1
    assert len(padding((SHORT - 1, 1), (SHORT, 1))) == 2
