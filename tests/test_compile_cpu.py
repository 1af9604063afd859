"""The CPU kernel is compiled once, kept, shared by processes and threads, and done without where it cannot be had."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import prefix_attn as pa
from prefix_attn import dispatch
from prefix_attn.backends import compile_cpu, reference
from prefix_attn.checks import checked_call
from tests.cases import DECODE, Case, make
from tests.tolerance import assert_close

ROOT = Path(__file__).parent.parent


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of this test, and nothing remembered of another."""
    monkeypatch.setenv("PREFIX_ATTN_CACHE", str(tmp_path))
    for kept in (compile_cpu.library, compile_cpu.missing):
        kept.cache_clear()
    yield tmp_path
    for kept in (compile_cpu.library, compile_cpu.missing):
        kept.cache_clear()


@pytest.mark.parametrize("error", [RuntimeError("no home directory"), PermissionError("not yours")])
def test_without_a_folder_to_look_in_pytorch_runs_the_call(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A user without a home, or who may not enter it, as in containers."""

    def refuse() -> Path:
        raise error

    monkeypatch.setattr(compile_cpu, "cache_folder", refuse)
    choice = dispatch.choose(checked_call(*make(DECODE).args))
    assert choice.name == "torch"
    assert f"{error}; set PREFIX_ATTN_CACHE" in choice.reason


def test_compiles_once_and_keeps_the_result(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_cpu.library(16, torch.float32)
    (kept,) = empty_cache.iterdir()
    compile_cpu.library.cache_clear()
    monkeypatch.setattr(compile_cpu, "_compile", lambda *_: pytest.fail("it is there"))
    compile_cpu.library(16, torch.float32)
    assert [kept] == list(empty_cache.iterdir())


def test_what_cannot_be_loaded_is_compiled_anew(empty_cache: Path) -> None:
    """As a loss of power may leave it; in processes of their own, since a loaded library is not looked for again."""
    code = "import torch; from prefix_attn.backends import compile_cpu; compile_cpu.library(16, torch.float32)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    (kept,) = empty_cache.iterdir()
    size = kept.stat().st_size
    kept.write_bytes(b"")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert kept.stat().st_size == size > 1000


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("g++ '", "CXX: expected a command"),
        ("", "no C.. compiler"),
        ("/bin/false", "/bin/false .* failed"),
        ("/nowhere/cc", "/nowhere/cc cannot be run: .*; set CXX"),
    ],
)
def test_without_a_compiler_pytorch_runs_the_call_and_says_why(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, why: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(compile_cpu, "COMPILERS", ())
    inputs = make(DECODE)
    choice = dispatch.choose(checked_call(*inputs.args))
    assert choice.name == "torch"
    assert "cpu: " in choice.reason
    with pytest.raises(pa.BackendUnavailable, match=why):
        pa.prefix_attention(*inputs.args, backend="cpu")
    monkeypatch.delenv("CXX")
    assert dispatch.choose(checked_call(*inputs.args)).name == "torch", "it is not tried again at every call"
    assert not list(empty_cache.glob("*.so"))


def test_processes_that_compile_at_once_do_not_disturb_each_other(empty_cache: Path) -> None:
    script = "import torch; from prefix_attn.backends.compile_cpu import library; library(16, torch.float32).attention"
    running = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list(empty_cache.iterdir())) == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is one of x86-64's")
def test_narrow_vectors_give_the_same(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four lanes, as the oldest of these processors have."""
    oldest = tuple("-march=x86-64" if flag == "-march=native" else flag for flag in compile_cpu.FLAGS)
    monkeypatch.setattr(compile_cpu, "FLAGS", oldest)
    for case in (DECODE, Case("many_queries", q_heads=20, q_len=3, kv_len=270, prefix_lens=(7, 0, 520))):
        inputs = make(case)
        exact, eager = (reference.attend(checked_call(*inputs.args), x) for x in (torch.float64, torch.float32))
        assert_close("out", pa.prefix_attention(*inputs.args, backend="cpu"), eager[0], exact[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    """Neither on PyTorch's, nor on how many call at once."""
    generator = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(shape, generator=generator) for shape in ((8, 8, 1, 64), (8, 4, 700, 64)))
    prefix = pa.PrefixKV.pack([(torch.randn(4, 600, 64, generator=generator),) * 2])

    def run(_: int = 0) -> torch.Tensor:
        return pa.prefix_attention(q, kv, kv, prefix, [0, 0, -1, 0, 0, 0, -1, 0], backend="cpu")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        expected = run()
        torch.set_num_threads(before)
        assert torch.equal(run(), expected)
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(run, range(12)))
