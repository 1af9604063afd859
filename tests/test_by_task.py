"""Prefixes that one strided view of the bank shows: when they are found, and that they are read right."""

from __future__ import annotations

import pytest
import torch

import prefix_attn as pa
from prefix_attn.backends.by_task import even_readers_of

SPANS = ((0, 20), (32, 20), (64, 20), (96, 7), (112, 0))


@pytest.mark.parametrize(
    ("ids", "tasks", "spacing"),
    [((0, 0), 1, 20), ((2, 1, 0), 3, 32), ((0, 2), 2, 64), ((1, -1, 1, 2, 4), 2, 32), ((3,), 1, 7)],
    ids=str,
)
def test_found(ids: tuple[int, ...], tasks: int, spacing: int) -> None:
    even = even_readers_of(ids, SPANS, most_repeated=len(ids))
    assert even is not None
    assert (even.tasks, even.spacing) == (tasks, spacing)


@pytest.mark.parametrize(
    ("ids", "most_repeated"),
    [((-1, 4), 9), ((0, 3), 9), ((0, 0, 1), 0), ((0, 1, 3), 9)],
    ids=["no prefix", "two lengths", "uneven", "a length apart"],
)
def test_not_found(ids: tuple[int, ...], most_repeated: int) -> None:
    assert even_readers_of(ids, SPANS, most_repeated) is None


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("ids", [[1, 0, 1, 2, 1], [0, 1, 2], [2, 2], [2, -1, 0, 0], [1, 0, 2, 1, 2, 0]], ids=str)
def test_read_right(ids: list[int], q_len: int) -> None:
    rng = torch.Generator().manual_seed(len(ids))
    batch, m, n = len(ids), 20, 6
    prefix = pa.PrefixKV.pack(
        [(torch.randn(2, m, 16, generator=rng), torch.randn(2, m, 16, generator=rng)) for _ in range(3)]
    )
    q, k, v = (torch.randn(batch, h, s, 16, generator=rng) for h, s in ((4, q_len), (2, n), (2, n)))
    got, lse = pa.prefix_attention(q, k, v, prefix, ids, backend="torch", return_lse=True)
    expected, expected_lse = pa.prefix_attention(q, k, v, prefix, ids, backend="reference", return_lse=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2e-6)
