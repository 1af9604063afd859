"""Peers that call libraries: what they hand over, tested against stand-ins, and why they are left out if they are."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.peers import Peer, all_peers, flashinfer
from benchmarks.peers.flash_attn import FlashAttnKvcache, FlashAttnVarlen, TorchVarlen
from benchmarks.peers.flashinfer import FlashInferCascade, FlashInferPlain
from benchmarks.peers.flex_attention import FlexAttention
from tests.benchmarks import fakes
from tests.benchmarks.test_peers import DECODE, DEVICE, PREFILL, ragged, right

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="stand-ins compute on the CPU; a GPU has the libraries")

LENS, IDS = [37, 5, 16], [1, 0, 2, 1, 1]
EVEN_IDS = [1, 0, 2, 0, 2, 1]


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fakes.flash_attn())


@pytest.fixture
def flashinfer_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name, module in fakes.flashinfer(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flashinfer, "WORKSPACE", 16)
    return tmp_path


@pytest.mark.parametrize("sizes", [{}, {"q_heads": 6, "kv_heads": 2, "dtype": "bfloat16"}, {"q_heads": 2}], ids=str)
@pytest.mark.parametrize("point", [DECODE, PREFILL], ids=lambda p: p.op)
@pytest.mark.usefixtures("flash_attn")
def test_flash_attn(point: object, sizes: dict[str, int]) -> None:
    problem = ragged(replace(point, **sizes), LENS, IDS)  # type: ignore[type-var]
    right(FlashAttnVarlen(), problem)
    if problem.point.q_len > 1:
        assert "decode" in str(FlashAttnKvcache().unsuited(problem.point))
        return
    right(FlashAttnKvcache(), ragged(problem.point, LENS, EVEN_IDS))
    with pytest.raises(ValueError, match="1 to 3 rows"):
        FlashAttnKvcache().prepare(problem)


@pytest.mark.parametrize("version", [fakes.varlen_attn_by_flag, fakes.varlen_attn_by_window])
def test_torch_varlen(version: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", version)
    for point in (DECODE, PREFILL):
        right(TorchVarlen(), ragged(point, LENS, IDS))


def test_what_the_merging_peers_cannot_express(monkeypatch: pytest.MonkeyPatch) -> None:
    for lens, ids in (([3, 0], [0, 1]), ([3, 4], [0, -1])):
        with pytest.raises(ValueError, match="without"):
            TorchVarlen().prepare(ragged(DECODE, lens, ids))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, *_, **__: (q, torch.zeros(3)))
    with pytest.raises(ValueError, match="log-sum-exps of shape"):
        TorchVarlen().prepare(ragged(DECODE, LENS, IDS))()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flashinfer(flashinfer_here: Path, dtype: str) -> None:
    problem = ragged(replace(DECODE, dtype=dtype, n=20), LENS, IDS)
    for peer in (FlashInferCascade("fa2"), FlashInferCascade("auto"), FlashInferPlain()):
        assert "not compiled yet" in str(peer.unsuited(problem.point))
        flashinfer.marker(peer.backend, dtype, 16).touch()
        assert peer.unsuited(PREFILL) == "only its decode is compared"
        right(peer, problem)
        assert peer.plan_us is not None
        flashinfer.marker(peer.backend, dtype, 16).unlink()


def test_flashinfer_plans_once_for_all_input_sets(flashinfer_here: Path) -> None:
    peer, made = FlashInferCascade("fa2"), fakes.MultiLevelCascadeAttentionWrapper.made
    peer.compiling = True
    for seed in (1, 2):
        right(peer, ragged(DECODE, LENS, IDS, seed))
    right(peer, ragged(DECODE, LENS, EVEN_IDS))
    assert fakes.MultiLevelCascadeAttentionWrapper.made == made + 2
    wrapper = peer.latest[1]  # type: ignore[index]
    assert [level._backend for level in wrapper._batch_prefill_wrappers] == ["fa2", "fa2"]


def test_flashinfer_is_compiled_combination_by_combination(
    flashinfer_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flashinfer.compile_kernels() == 2  # no GPU
    monkeypatch.setattr(FlashInferPlain, "unavailable", lambda self, device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    prepare = FlashInferCascade.prepare

    def without_auto(self: FlashInferCascade, problem: object) -> object:
        if self.backend == "auto":
            raise RuntimeError("Ninja build failed\nand much more")
        return prepare(self, problem)  # type: ignore[arg-type]

    monkeypatch.setattr(FlashInferCascade, "prepare", without_auto)
    assert flashinfer.compile_kernels() == 1
    said = capsys.readouterr().out
    assert "flashinfer fa2, bfloat16, head_dim 128: compiled in " in said
    assert "flashinfer auto, bfloat16, head_dim 128: RuntimeError: Ninja build failed\n" in said
    compiled = [x for x in flashinfer.COMBINATIONS if flashinfer.marker(*x).exists()]
    assert compiled == [x for x in flashinfer.COMBINATIONS if x[0] == "fa2"]


@pytest.mark.parametrize("point", [DECODE, PREFILL], ids=lambda p: p.op)
def test_flex_attention(point: object) -> None:
    peer = FlexAttention(compiled=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is not compiled
        for seed in (1, 2):
            right(peer, ragged(point, LENS, [1, 0, -1, 2, 1], seed))  # type: ignore[arg-type]
        masks = {id(peer.latest[1])}  # type: ignore[index]
        right(peer, ragged(point, LENS, EVEN_IDS))  # type: ignore[arg-type]
    masks.add(id(peer.latest[1]))  # type: ignore[index]
    assert len(masks) == 2
    assert peer.plan_us is not None


def test_flex_attention_stops_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = FlexAttention(compiled=False, compile_seconds=1.0)
    peer.compiled, peer.spent = True, 1.5
    with pytest.raises(RuntimeError, match="1 s were spent on compiling"):
        peer.prepare(ragged(DECODE, LENS, IDS))
    assert peer.latest is None
    assert "pairs" in str(peer.unsuited(replace(PREFILL, batch=64, n=4096)))


def test_absent_libraries_say_so() -> None:
    cuda = torch.device("cuda")
    for peer in (FlashAttnVarlen("flash_attn"), FlashAttnKvcache("flash_attn_interface"), FlashInferPlain()):
        assert "on GPUs only" in str(peer.unavailable(DEVICE))
        package = getattr(peer, "package", "flashinfer")
        if find_spec(package) is None:
            assert str(peer.unavailable(cuda)).startswith(f"{package} cannot be imported (ModuleNotFoundError")
    assert "on GPUs only" in str(TorchVarlen().unavailable(DEVICE))
    assert TorchVarlen().unavailable(cuda) is None


def test_peers_have_names_of_their_own() -> None:
    peers: list[Peer] = all_peers()
    assert len({peer.name for peer in peers}) == len(peers)
    assert all(peer.version for peer in peers)
