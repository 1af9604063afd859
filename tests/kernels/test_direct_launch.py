"""A direct launch hands over what Triton's own launch does; a driver without a device stands in and takes notes."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.pretended_gpu import pretend
from tests.cases import Case, make

#: Of each launch: whether Triton was asked, the grid, the compiled kernel, and the arguments, tensors as addresses.
Launch = tuple[bool, tuple[int, ...], int, tuple[Any, ...]]

CASE = Case("launch", prefix_lens=(40, 33), task_ids=(0, 1), kv_len=300, head_dim=64, q_len=3)


def take_notes(launches: list[Launch]) -> None:
    """Compile for an H200, and note down what would be launched there."""
    import triton

    asked: list[object] = []

    def note(grid: tuple[int, int, int], kernel: int, arguments: tuple[Any, ...]) -> None:
        plain = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
        launches.append((bool(asked), grid, kernel, plain))
        asked.clear()

    pretend(note)
    run = triton.JITFunction.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        asked.append(self)
        return run(self, *args, **options)

    triton.JITFunction.run = noted


def launch_repeatedly(way: str, hip: str | None = None) -> list[Launch]:
    """The same call twice, then with a q that is not aligned, then with a second result; ``hip`` is PyTorch's."""
    launches: list[Launch] = []
    torch.version.hip = hip
    take_notes(launches)
    from prefix_attn.checks import checked_call
    from prefix_attn.kernels.decode import decode_attention
    from prefix_attn.kernels.merge import Partials, merge_chunks
    from prefix_attn.kernels.prefill import prefill_attention

    inputs = make(CASE, torch.bfloat16)
    plain = checked_call(*inputs.args, **inputs.options)
    odd = torch.zeros(plain.q.numel() + 1, dtype=torch.bfloat16)[1:].view(plain.q.shape)
    out, lse = torch.empty_like(plain.q), torch.empty(plain.q.shape[:3])
    partials = Partials.empty(2, out, kv_heads=1)
    for q, second in ((plain.q, None), (plain.q, None), (odd, None), (plain.q, lse)):
        if way == "decode":
            decode_attention(replace(plain, q=q), out, second, chunks=1)
        elif way == "prefill":
            prefill_attention(replace(plain, q=q), out, second)
        else:
            merge_chunks(partials, out if q is plain.q else odd, second, None, most_chunks=2)
    return launches


@pytest.mark.parametrize("way", ["decode", "prefill", "merge"])
def test_direct_launches(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # of the process that launches
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        first, again, odd, second = pool.apply(launch_repeatedly, (way,))
    assert [launch[0] for launch in (first, again, odd, second)] == [True, False, True, True]
    assert again[1:] == first[1:]
    assert odd[2] != first[2], "addresses that are not aligned take another kernel"
    assert second[2] != first[2], "so does another result"
    assert len(first[3]) > 10


def profiled_launches() -> list[str]:
    """What a profiler hears of a launch, the same again, and one after it has gone."""
    import triton

    launches: list[Launch] = []
    take_notes(launches)
    from prefix_attn.kernels.merge import Partials, merge_chunks

    out, heard = torch.zeros(2, 2, 1, 64), []
    partials, hook = Partials.empty(2, out, kv_heads=1), lambda about: heard.append(about.get()["name"])
    for added in (False, True, True, False):
        change = triton.knobs.runtime.launch_enter_hook
        (change.add if added else change.remove)(hook)
        merge_chunks(partials, out, None, None, most_chunks=2)
    assert len(launches) == 4
    return heard


def test_profilers_hear_of_direct_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(profiled_launches) == ["merge_kernel"] * 2


def test_on_amd_triton_is_always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels depend on the size of what a tensor is a view of, too."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        launches = pool.apply(launch_repeatedly, ("merge", "7.0"))
    assert [launch[0] for launch in launches] == [True] * 4
