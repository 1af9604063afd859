"""Tensors whose elements lie further apart than 32 bits can count.

Strided views make them so, over one buffer full of NaN; the same numbers in small tensors must give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import prefix_attn as pa
from prefix_attn.backends.triton import MAX_STRIDE
from tests.cases import Case, Inputs, make

FAR = 2**31
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Elements of the buffer: one row of 2^31, and room behind it for the small tensors.
ELEMENTS = FAR + 2**21

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: offsets past 2^31 elements are not tested")

CASE = Case("far", prefix_lens=(40, 33), task_ids=(0, 1), kv_len=50, head_dim=128)
QUERIES = pytest.mark.parametrize("q_len", [1, 40], ids=("decode", "prefill"))


@pytest.fixture
def buffer() -> Iterator[Tensor]:
    """NaN, a little more than 2^31 elements of it."""
    need = 3 * 2 * ELEMENTS  # three times over, since tests may run side by side
    free = torch.cuda.mem_get_info()[0]
    if free < need:
        pytest.skip(f"offsets past 2^31 elements need {need / 1e9:.0f} GB of free memory, there are {free / 1e9:.0f}")
    yield torch.full((ELEMENTS,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    torch.cuda.empty_cache()


def spread(buffer: Tensor, x: Tensor, stride: tuple[int, ...], offset: int = 0) -> Tensor:
    """The numbers of x in a view of the buffer with these strides, in elements."""
    view = buffer.as_strided(x.shape, stride, offset)
    view.copy_(x)
    return view


def run(inputs: Inputs) -> Tensor:
    out = pa.prefix_attention(*inputs.args, **inputs.options, backend="triton")
    assert isinstance(out, Tensor)
    return out


def inputs_of(q_len: int, **sizes: object) -> Inputs:
    return make(replace(CASE, q_len=q_len, **sizes), torch.bfloat16, DEVICE)  # type: ignore[arg-type]


def check(near: Inputs, far: Inputs) -> None:
    out = run(near)
    assert not out.isnan().any()
    assert torch.equal(run(far), out)


@QUERIES
def test_rows_far_apart(buffer: Tensor, q_len: int) -> None:
    near = inputs_of(q_len)
    small = 2**17
    q, k, v = (spread(buffer, x, (FAR, *x.stride()[1:]), i * small) for i, x in enumerate((near.q, near.k, near.v)))
    check(near, replace(near, q=q, k=k, v=v))


@QUERIES
def test_keys_far_apart(buffer: Tensor, q_len: int) -> None:
    n = FAR // MAX_STRIDE + 1
    near = inputs_of(q_len, kv_len=n, q_heads=1, kv_heads=1, task_ids=(0,), prefix_lens=(16,))
    k, v = (spread(buffer, x, (0, 0, MAX_STRIDE, 1), i * 128) for i, x in enumerate((near.k, near.v)))
    check(near, replace(near, k=k, v=v))


@QUERIES
def test_heads_of_a_bank_far_apart(buffer: Tensor, q_len: int) -> None:
    near = inputs_of(q_len)
    k, v = (spread(buffer, x, (FAR, 128, 1), i * 2**17) for i, x in enumerate((near.prefix.k, near.prefix.v)))
    check(near, replace(near, prefix=replace(near.prefix, k=k, v=v)))


@QUERIES
def test_a_task_at_the_end_of_a_large_bank(buffer: Tensor, q_len: int) -> None:
    near = inputs_of(q_len, q_heads=2, kv_heads=1, task_ids=(1, 0))
    tokens = FAR // 128 + 64
    start = near.prefix.starts.tolist()[1]
    banks = []
    for i, x in enumerate((near.prefix.k, near.prefix.v)):
        bank = buffer.as_strided((1, tokens, 128), (tokens * 128, 128, 1), i * 64 * 128)
        bank[:, :start] = x[:, :start]
        bank[:, -64:-16] = x[:, start : start + 48]
        banks.append(bank)
    starts = near.prefix.starts.clone()
    starts[1] = tokens - 64
    check(near, replace(near, prefix=replace(near.prefix, k=banks[0], v=banks[1], starts=starts)))


def test_an_output_of_more_than_two_to_the_31(buffer: Tensor) -> None:
    """Millions of queries that see only the prefix: the last of them must come out like the same few alone."""
    few = inputs_of(40, q_heads=1, kv_heads=1, kv_len=0, task_ids=(0,), causal=False)
    rows = FAR // 128 + 40
    q = buffer[: rows * 128].view(1, 1, rows, 128)
    q.zero_()
    q[:, :, -40:] = few.q
    out = run(replace(few, q=q))
    assert out.numel() > FAR
    torch.testing.assert_close(out[:, :, -40:], run(few), rtol=1e-2, atol=1e-2)
