"""Tasks in use: what is removed or replaced meanwhile stays as it was for those who began with it."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prefix_attn as pa
from prefix_attn.bank import PrefixBank
from tests.bank.models import bits, random_kv, read, tiny

MODEL = tiny()
BASE = PrefixBank.for_model(MODEL).base


@pytest.fixture
def bank() -> PrefixBank:
    bank = PrefixBank(BASE)
    for seed, name in enumerate("abc"):
        bank.add(name, random_kv(bank.geometry, 5 + seed, seed))
    return bank


def kept(bank: PrefixBank, task_id: int) -> list[bytes]:
    """The bits that a row with this id reads."""
    layers = [bank.layer(i) for i in range(bank.num_layers)]
    spans = [layer.spans[task_id] for layer in layers]
    return bits([(p.k[:, s : s + n], p.v[:, s : s + n]) for p, (s, n) in zip(layers, spans, strict=True)])


def test_a_removed_task_stays_for_those_who_hold_it(bank: PrefixBank) -> None:
    before = kept(bank, 1)
    bank.hold([1, -1, 1])
    bank.hold([1])
    bank.remove("b")
    assert bank.names == ["a", "c"]
    with pytest.raises(pa.UnknownTask, match="'b'"):
        bank.task_ids(["b"])
    for seed in range(9):
        bank.add(f"new{seed}", random_kv(bank.geometry, 40, seed))
    assert kept(bank, 1) == before
    bank.release([1, -1, 1])
    assert bank.lengths[1] == 6, "one more holds it"
    bank.release([1])
    assert bank.lengths[1] == -1
    with pytest.raises(pa.UnknownTask, match="was removed"):
        bank.hold([1])


def test_a_task_that_nobody_removed_stays(bank: PrefixBank) -> None:
    bank.hold([0, 2])
    bank.release([0, 2])
    assert bank.lengths == [5, 6, 7]


def test_an_iterator_of_ids(bank: PrefixBank) -> None:
    bank.hold(x for x in (0, -1))
    bank.remove("a")
    assert bank.lengths[0] == 5
    bank.release(x for x in (0, -1))
    assert bank.lengths[0] == -1


@pytest.mark.parametrize("wrong", ["a", ["a"], [None], [0.5]])
def test_what_is_no_id_is_not_held(bank: PrefixBank, wrong: Any) -> None:
    with pytest.raises(pa.DTypeError, match="expected ids"):
        bank.hold(wrong)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, copy.copy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_nobody_holds_the_tasks_of_a_copy(bank: PrefixBank, twin_of: Any) -> None:
    bank.hold([0, 1])
    bank.remove("a")
    twin = twin_of(bank)
    assert (twin.names, twin.lengths) == (["b", "c"], [-1, 6, 7])
    assert bits(read(twin, "b")) == bits(read(bank, "b"))
    twin.remove("b")
    assert twin.lengths == [-1, -1, 7]
    assert bank.lengths == [5, 6, 7]


def test_replace(bank: PrefixBank) -> None:
    old = kept(bank, 0)
    bank.hold([0])
    new = random_kv(bank.geometry, 11, seed=9)
    assert bank.add("a", new, replace=True) == 3
    assert bank.names == ["b", "c", "a"], "in the order of ids"
    assert bits(read(bank, "a")) == bits(new)
    assert kept(bank, 0) == old
    bank.release([0])
    assert bank.lengths == [-1, 6, 7, 11]
    assert bank.add("d", new, replace=True) == 4, "one that is not there is added"


def test_what_cannot_replace_changes_nothing(bank: PrefixBank) -> None:
    before = bits(read(bank, "a"))
    with pytest.raises(pa.IncompatiblePrefix, match=r"give another, remove it first, or pass replace=True"):
        bank.add("a", random_kv(bank.geometry, 4))
    with pytest.raises(pa.IncompatiblePrefix):
        bank.add("a", random_kv(bank.geometry, 4)[:1], replace=True)
    assert bank.names == ["a", "b", "c"]
    assert bits(read(bank, "a")) == before


def test_a_reserve_must_hold_both() -> None:
    bank = PrefixBank.for_model(MODEL, reserve=(3, 32))
    bank.add("a", random_kv(bank.geometry, 16))
    bank.add("a", random_kv(bank.geometry, 16, seed=1), replace=True)
    bank.hold([1])
    bank.remove("a")
    bank.add("b", random_kv(bank.geometry, 16))
    bank.release([1])
    with pytest.raises(pa.ShapeError, match="at most 3 tasks"):
        bank.add("c", random_kv(bank.geometry, 16))


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "replace", "remove", "hold", "release"]), st.sampled_from("abc")),
    min_size=5,
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(actions=ACTIONS)
def test_any_sequence_keeps_what_is_held(actions: list[tuple[str, str]]) -> None:
    bank = PrefixBank(BASE)
    content: dict[int, list[bytes]] = {}
    holds: list[int] = []
    names: dict[str, int] = {}
    for seed, (action, name) in enumerate(actions):
        if action in ("add", "replace") and (action == "replace" or name not in names):
            key_values = random_kv(bank.geometry, 3 + seed, seed)
            task_id = bank.add(name, key_values, replace=action == "replace")
            names.pop(name, None)
            names[name], content[task_id] = task_id, bits(key_values)
        elif name in names and action == "remove":
            bank.remove(name)
            del names[name]
        elif name in names and action == "hold":
            bank.hold([names[name]])
            holds.append(names[name])
        elif action == "release" and holds:
            bank.release([holds.pop(seed % len(holds))])
        alive = {*names.values(), *holds}
        assert bank.names == list(names)
        assert {i for i, length in enumerate(bank.lengths) if length >= 0} == alive
        assert all(kept(bank, task_id) == content[task_id] for task_id in alive)
    assert Counter(bank.lengths)[-1] == len(content) - len({*names.values(), *holds})


def test_readers_never_see_a_change_half_done(bank: PrefixBank) -> None:
    """One thread adds and removes, and makes the memory grow; another looks at what it holds."""
    wanted = kept(bank, 0)
    bank.hold([0])
    wrong: list[Any] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            layer, twin = bank.layer(1), copy.deepcopy(bank)
            bank.key_values("c")
            bank.plan(["c", None])
            if len(twin.lengths) != len(twin.lens) or twin.names[-1] not in ("c", "x"):
                wrong.append("a torn copy")
                return
            if kept(bank, 0) != wanted or int((layer.starts + layer.lens.clamp(min=0)).max()) > layer.k.shape[1]:
                wrong.append("other bits, or a span outside the memory")
                return

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        bank.remove("a")
        for seed in range(150):
            bank.add("x", random_kv(bank.geometry, 1 + seed % 50, seed), replace=True)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert torch.equal(bank.lens, torch.tensor(bank.lengths, dtype=torch.int32))


def test_a_bank_is_saved_while_it_changes(bank: PrefixBank, tmp_path: Path) -> None:
    """As it was at one moment."""
    done = threading.Event()

    def change() -> None:
        for seed in itertools.count():
            bank.add("x", random_kv(bank.geometry, 1 + seed % 50, seed), replace=True)
            bank.remove("x")
            if done.is_set():
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for i in range(8):
            bank.save_pretrained(tmp_path / str(i))
            saved = PrefixBank.from_pretrained(tmp_path / str(i), MODEL)
            assert saved.names[:3] == ["a", "b", "c"]
    finally:
        done.set()
        thread.join()
    assert len([length for length in bank.lengths if length >= 0]) == 3
