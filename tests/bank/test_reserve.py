"""A bank with a reserve: tensors that keep their place, whatever is added and removed."""

from __future__ import annotations

import pytest
import torch

import prefix_attn as pa
from prefix_attn.bank import PrefixBank
from tests.bank.models import random_kv, tiny

MODEL = tiny()


def reserved(tasks: int = 4, tokens: int = 64) -> PrefixBank:
    return PrefixBank.for_model(MODEL, reserve=(tasks, tokens))


def places(bank: PrefixBank) -> list[int]:
    layers = [bank.layer(i) for i in range(bank.num_layers)]
    return [x.data_ptr() for layer in layers for x in (layer.k, layer.v, layer.starts, layer.lens)]


def attend(prefix: pa.PrefixKV, ids: list[int], backend: str = "auto") -> torch.Tensor:
    q, k, v = torch.randn(3, len(ids), 2, 1, 8, generator=torch.Generator().manual_seed(0))
    out = pa.prefix_attention(q, k, v, prefix, ids, backend=backend)
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_was_handed_out_shows_every_change(backend: str) -> None:
    bank, plain = reserved(), PrefixBank.for_model(MODEL)
    before, memory, prefix, plan = places(bank), bank.memory_usage.allocated, bank.layer(1), bank.plan([])
    for seed, (name, m) in enumerate({"a": 7, "b": 20, "c": 16}.items()):
        for each in (bank, plain):
            each.add(name, random_kv(each.geometry, m, seed=seed))
    assert torch.equal(attend(prefix, [0, 2, 1, -1], backend), attend(plain.layer(1), [0, 2, 1, -1], backend))
    for each in (bank, plain):
        each.remove("b")
        each.add("d", random_kv(each.geometry, 30, seed=9))  # where b was
    assert torch.equal(attend(prefix, [0, 2, 3, -1], backend), attend(plain.layer(1), [0, 2, 3, -1], backend))
    with pytest.raises(pa.UnknownTask, match=r"one of \[0, 2, 3\], got 1"):
        attend(prefix, [1], backend)
    assert places(bank) == before
    assert plan.lens is bank.lens
    assert bank.memory_usage.allocated == memory


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    bank = reserved(tasks=2, tokens=40)  # 40 become 48
    bank.add("a", random_kv(bank.geometry, 20, seed=0))
    with pytest.raises(pa.ShapeError, match="free stretch of 32 tokens for a prefix of 17"):
        bank.add("b", random_kv(bank.geometry, 17, seed=1))
    assert bank.names == ["a"]
    bank.add("b", random_kv(bank.geometry, 16, seed=1))
    bank.remove("a")
    with pytest.raises(pa.ShapeError, match="at most 2 tasks, removed ones included"):
        bank.add("c", random_kv(bank.geometry, 1, seed=2))
    assert bank.task_ids(["b"]).tolist() == [1]
    with pytest.raises(pa.ShapeError, match="negative"):
        reserved(tasks=-1)


def test_added_and_removed_tasks_do_not_recompile() -> None:
    bank = reserved()
    bank.add("a", random_kv(bank.geometry, 7, seed=0))
    q, k, v = torch.randn(3, 2, 2, 1, 8)

    def step(ids: torch.Tensor) -> torch.Tensor:
        out = pa.prefix_attention(q, k, v, bank.layer(0), ids)
        assert isinstance(out, torch.Tensor)
        return out

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    ids = torch.tensor([0, -1], dtype=torch.int32)
    assert torch.equal(compiled(ids), step(ids))
    with torch.compiler.set_stance("fail_on_recompile"):
        bank.add("b", random_kv(bank.geometry, 30, seed=1))
        bank.remove("a")
        ids = torch.tensor([1, 1], dtype=torch.int32)
        assert torch.equal(compiled(ids), step(ids))
