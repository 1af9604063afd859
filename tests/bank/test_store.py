"""The store: ids, bits, memory, snapshots; and everything `add` refuses."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_attn import ContextOverflow, DTypeError, IncompatiblePrefix, PrefixAttnError, ShapeError, UnknownTask
from prefix_attn.bank import MemoryUsage, PrefixBank, plans
from prefix_attn.types import ALIGNMENT, PrefixKV
from tests.bank.models import bits, random_kv, read, same_bits, state, tiny

MODEL = tiny()
BASE = PrefixBank.for_model(MODEL).base


@pytest.fixture
def bank() -> PrefixBank:
    return PrefixBank.for_model(MODEL)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abcdef"), st.integers(0, 40)),
        st.tuples(st.just("remove"), st.sampled_from("abcdef"), st.just(0)),
        st.tuples(st.just("look"), st.just(""), st.just(0)),
    ),
    min_size=4,
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(steps=STEPS)
def test_any_sequence_matches_a_dict(steps: list[tuple[str, str, int]]) -> None:
    bank = PrefixBank(BASE)
    expected: dict[str, tuple[int, list[bytes]]] = {}
    snapshots: list[tuple[list[PrefixKV], dict[str, tuple[int, list[bytes]]]]] = []
    ids = 0
    for step, (action, name, tokens) in enumerate(steps):
        if action == "look":
            snapshots.append(([bank.layer(i) for i in range(bank.num_layers)], dict(expected)))
        elif action == "remove" and name in expected:
            bank.remove(name)
            stale, _ = expected.pop(name)
            with pytest.raises(UnknownTask, match="was removed"):
                bank.task_ids([stale])
        elif action == "add" and name not in expected:
            key_values = random_kv(bank.geometry, tokens, seed=step)
            assert bank.add(name, key_values) == ids
            expected[name] = (ids, bits(key_values))
            ids += 1
        assert bank.names == list(expected)
        assert bank.lens.tolist() == bank.lengths
        assert len(bank.lengths) == ids
    layers = [bank.layer(i) for i in range(bank.num_layers)]
    for prefixes, tasks in [*snapshots, (layers, expected)]:  # old snapshots still show what they showed
        for task, content in tasks.values():
            spans = [prefix.spans[task] for prefix in prefixes]
            pairs = [(p.k[:, s : s + n], p.v[:, s : s + n]) for p, (s, n) in zip(prefixes, spans, strict=True)]
            assert bits(pairs) == content
    spans = sorted((s, s + n) for s, n in layers[0].spans if n > 0)
    assert all(start % ALIGNMENT == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_for_model_follows_the_model() -> None:
    bank = PrefixBank.for_model(tiny().to(torch.bfloat16))
    assert bank.dtype == torch.bfloat16
    assert bank.device == torch.device("cpu")
    assert bank.num_layers == 2
    assert bank.context_limit == 64
    assert [layer[:2] for layer in bank.geometry.layers] == [(2, 8), (2, 8)]
    assert len(bank) == 0
    assert bank.layer(0).k.shape == (2, 0, 8)
    assert bank.task_ids([None, None]).tolist() == [-1, -1]


def test_values_are_copied_and_converted(bank: PrefixBank) -> None:
    key_values = [(k.double().requires_grad_(), v.double()) for k, v in random_kv(bank.geometry, 7)]
    before = bits([(k.float(), v.float()) for k, v in key_values])
    bank.add("a", key_values)
    with torch.no_grad():
        key_values[0][0].zero_()
    assert bits(read(bank, "a")) == before
    assert not bank.layer(0).k.requires_grad
    bank16 = PrefixBank.for_model(tiny().to(torch.bfloat16))
    bank16.add("a", key_values)
    assert torch.equal(read(bank16, "a")[1][1], key_values[1][1].to(torch.bfloat16))


def test_non_contiguous_values(bank: PrefixBank) -> None:
    key_values = [(k.transpose(0, 1).contiguous().transpose(0, 1), v.flip(1)) for k, v in random_kv(bank.geometry, 9)]
    bank.add("a", key_values)
    assert same_bits(read(bank, "a"), key_values)


def test_live_tasks_stay_where_they_are(bank: PrefixBank) -> None:
    """Bits and, while nothing grows, addresses."""
    for i, name in enumerate("abcd"):
        bank.add(name, random_kv(bank.geometry, 16, seed=i))
    before = bank.layer(0)
    bank.remove("b")
    assert bank.layer(0).k.data_ptr() == before.k.data_ptr()
    assert bank.layer(0).spans[2] == before.spans[2]
    assert before.spans[1] == (16, 16)  # the old snapshot keeps its tables


def test_freed_space_is_used_again(bank: PrefixBank) -> None:
    for i, name in enumerate("abc"):
        bank.add(name, random_kv(bank.geometry, 16, seed=i))
    allocated = bank.memory_usage.allocated
    for i in range(20):
        bank.remove("b")
        bank.add("b", random_kv(bank.geometry, 11, seed=i))
        if i % 3 == 0:
            bank.layer(0)  # pins what is removed next
    # Only the table of ids grows: two int32 per id ever given.
    assert bank.memory_usage.allocated - allocated == 20 * 8
    assert bank.lengths[-1] == 11


def test_ids_names_and_lens(bank: PrefixBank) -> None:
    bank.add("a", random_kv(bank.geometry, 3))
    bank.add("b", random_kv(bank.geometry, 0))
    bank.remove("a")
    assert bank.add("a", random_kv(bank.geometry, 4)) == 2
    assert bank.names == ["b", "a"]
    assert bank.lens.tolist() == bank.lengths == [-1, 0, 4]
    assert bank.lens.dtype == torch.int32
    assert bank.prefix_len("a") == 4
    assert "a" in bank
    assert "c" not in bank
    ids = bank.task_ids(["a", None, "b", 2, -1])
    assert ids.tolist() == [2, -1, 1, 2, -1]
    assert ids.dtype == torch.int32
    tensor = torch.tensor([1, -1], dtype=torch.int64)
    assert bank.task_ids(tensor).tolist() == [1, -1]
    assert bank.task_ids(tensor).dtype == torch.int32
    assert bank.task_ids([]).shape == (0,)


@pytest.mark.parametrize(
    ("tasks", "error", "words"),
    [
        (["c"], UnknownTask, r"task_ids\[0\].*\['b', 'a'\].*'c'"),
        ([None, 0], UnknownTask, r"task_ids\[1\].*got 0 \(it was removed\)"),
        ([7], UnknownTask, r"got 7$"),
        ([-2], UnknownTask, r"got -2"),
        (torch.tensor([1, 0]), UnknownTask, r"task_ids\[1\]"),
        (torch.tensor([0.0]), DTypeError, "integer tensor"),
        (torch.tensor([[1]]), ShapeError, r"\[batch\]"),
        ("a", DTypeError, r"write \['a'\]"),
        ([True], DTypeError, "True"),
        ([1.0], DTypeError, "1.0"),
        ({"a"}, DTypeError, "list"),
        (None, DTypeError, "list"),
    ],
)
def test_bad_task_ids(bank: PrefixBank, tasks: object, error: type[Exception], words: str) -> None:
    bank.add("gone", random_kv(bank.geometry, 3))
    bank.add("b", random_kv(bank.geometry, 3))
    bank.add("a", random_kv(bank.geometry, 3))
    bank.remove("gone")
    with pytest.raises(error, match=words):
        bank.task_ids(tasks)  # type: ignore[arg-type]


def test_plan(bank: PrefixBank) -> None:
    bank.add("long", random_kv(bank.geometry, 9))
    bank.add("empty", random_kv(bank.geometry, 0))
    plan = bank.plan(["empty", "long", None, "long"])
    assert (plan.task_ids.tolist(), plan.lens.tolist()) == ([1, 0, -1, 0], [9, 0])
    assert bank.layer(0).max_len == 9
    with pytest.raises(UnknownTask):
        bank.plan(["short"])


def test_a_plan_counts_the_tasks_the_host_knows(bank: PrefixBank) -> None:
    for name in ("a", "b", "c"):
        bank.add(name, random_kv(bank.geometry, 3))
    assert bank.plan(["a", "c", None, 0, -1, "a"]).distinct == 2
    assert bank.plan([None]).distinct == 0
    assert bank.plan(torch.tensor([0, 1])).distinct is None


def test_the_plans_of_the_latest_batch_are_kept(bank: PrefixBank) -> None:
    for name in ("a", "b"):
        bank.add(name, random_kv(bank.geometry, 3))
    plan = bank.plan(["a", "b", "a"])
    ids = plan.task_ids
    assert bank.plan(ids) is plan, "of the same tensor, with what the host knew about it"
    assert bank.plans(ids)[bank.device] is plan
    assert bank.plan(ids.clone()) is not plan
    plan = bank.plan(ids)
    ids[0] = 1
    changed = bank.plan(ids)
    assert changed is not plan, "written to"
    assert changed.distinct is None
    bank.add("c", random_kv(bank.geometry, 5))
    assert bank.plan(ids) is not changed, "the bank has changed"
    with torch.inference_mode():
        some = torch.tensor([0, 1], dtype=torch.int32)
        assert bank.plan(some) is not bank.plan(some), "nobody would see it change"


def test_plans_are_made_anew_in_a_graph(bank: PrefixBank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.add("a", random_kv(bank.geometry, 3))
    before = bank.plan(["a", None])
    monkeypatch.setattr(plans, "recording", lambda tensor: True)
    inside = bank.plan(before.task_ids)
    assert inside is not before
    assert inside is not bank.plan(before.task_ids)
    monkeypatch.undo()
    assert bank.plan(before.task_ids) is before, "what a graph made is not kept"


def test_unknown_names(bank: PrefixBank) -> None:
    bank.add("a", random_kv(bank.geometry, 3))
    for call in (bank.remove, bank.prefix_len):
        with pytest.raises(UnknownTask, match=r"one of \['a'\], got 'x'"):
            call("x")


def _bad_values(bank: PrefixBank) -> dict[str, tuple[object, type[Exception], str]]:
    good = random_kv(bank.geometry, 4)
    k, v = good[1]
    nan, inf = v.clone(), k.clone()
    nan[1, 3, 7], inf[0, 0, 0] = torch.nan, torch.inf
    return {
        "missing layer": (good[:1], IncompatiblePrefix, "2 layers, got 1"),
        "no layer": ([], IncompatiblePrefix, "got 0"),
        "extra layer": ([*good, good[0]], IncompatiblePrefix, "got 3"),
        "heads": ([good[0], (k[:1], v[:1])], IncompatiblePrefix, r"layer 1 takes k .* \[2, 4, 8\], got \[1, 4, 8\]"),
        "head_dim": ([good[0], (k[..., :4], v)], IncompatiblePrefix, r"layer 1 takes k .*got \[2, 4, 4\]"),
        "batch axis": ([good[0], (k[None], v[None])], IncompatiblePrefix, r"layer 1 takes k .*got \[1, 2, 4, 8\]"),
        "tokens of v": ([good[0], (k, v[:, :3])], IncompatiblePrefix, r"layer 1 takes v .*got \[2, 3, 8\]"),
        "tokens of layer": ([good[0], (k[:, :3], v[:, :3])], IncompatiblePrefix, r"layer 1 takes k .*got \[2, 3, 8\]"),
        "no pair": ([good[0], k], IncompatiblePrefix, r"key_values\[1\]: expected a pair"),
        "no tensors": ([([1.0], [2.0])] * 2, IncompatiblePrefix, r"key_values\[0\]: expected a pair of tensors"),
        "None for a layer with keys": ([None, good[1]], IncompatiblePrefix, r"key_values\[0\]: .* got None"),
        "nothing": (None, IncompatiblePrefix, "2 layers, got NoneType"),
        "triple": ([good[0], (k, v, v)], IncompatiblePrefix, r"key_values\[1\]: expected a pair"),
        "no tensor": ([good[0], (k, v.numpy())], IncompatiblePrefix, r"key_values\[1\]: expected a pair"),
        "integers": ([good[0], (k.int(), v)], IncompatiblePrefix, "layer 1 takes floating-point k, got torch.int32"),
        "nan": ([good[0], (k, nan)], IncompatiblePrefix, "layer 1"),
        "inf": ([good[0], (inf, v)], IncompatiblePrefix, "layer 1"),
        "overflow": ([good[0], (k.double() * 1e300, v)], IncompatiblePrefix, "finite values in torch.float32"),
        "context": (random_kv(bank.geometry, 64), ContextOverflow, "at most 63 prefix tokens, got 64"),
    }


@pytest.mark.parametrize("case", list(_bad_values(PrefixBank(BASE))))
def test_add_refuses_and_changes_nothing(bank: PrefixBank, case: str) -> None:
    key_values, error, words = _bad_values(bank)[case]
    bank.add("a", random_kv(bank.geometry, 5))
    before = state(bank)
    with pytest.raises(error, match=words):
        bank.add("b", key_values)  # type: ignore[arg-type]
    assert state(bank) == before
    bank.add("b", random_kv(bank.geometry, 63))  # one position is left


@pytest.mark.parametrize(
    "name", ["", "a/b", "a\\b", "..", "a..b", ".hidden", "a\nb", "a\x00", "\ud800", "x" * 201, "é" * 101, None, 3, "a"]
)
def test_bad_names(bank: PrefixBank, name: object) -> None:
    bank.add("a", random_kv(bank.geometry, 5))
    before = state(bank)
    with pytest.raises(IncompatiblePrefix, match=r"^name: "):
        bank.add(name, random_kv(bank.geometry, 5))  # type: ignore[arg-type]
    assert state(bank) == before


def test_memory_usage_is_exact(bank: PrefixBank) -> None:
    bank.add("a", random_kv(bank.geometry, 5))
    bank.add("longer", random_kv(bank.geometry, 33))
    usage = bank.memory_usage
    assert usage.tasks == {name: sum(x.nbytes for pair in read(bank, name) for x in pair) for name in bank.names}
    assert usage.total == sum(usage.tasks.values())
    tensors = [x for i in range(bank.num_layers) for x in (bank.layer(i).k, bank.layer(i).v)]
    tables = [bank.layer(0).starts, bank.layer(0).lens]
    assert usage.allocated == sum(x.nbytes for x in tensors + tables)
    assert usage.allocated == sum(x.untyped_storage().nbytes() for x in tensors + tables)


def test_memory_usage_reads_well() -> None:
    usage = MemoryUsage(tasks={"a": 1023, "bb": 1024 * 1024}, total=1024 * 1024 + 1023, allocated=5 * 2**40)
    assert str(usage).splitlines() == [
        "a              1023 B",
        "bb            1.0 MiB",
        "total         1.0 MiB",
        "allocated     5.0 TiB",
    ]


def test_repr_says_what_a_user_wants_to_know(bank: PrefixBank) -> None:
    bank.add("summarize", random_kv(bank.geometry, 20))
    head, row = repr(bank).splitlines()
    assert head == "PrefixBank(1 task, 2 layers of 2 kv heads of 8, float32 on cpu, 5.0 KiB of 8.0 KiB)"
    assert row.split() == ["summarize", "20", "tokens", "5.0", "KiB"]


def test_layers_share_memory_and_tables(bank: PrefixBank) -> None:
    bank.add("a", random_kv(bank.geometry, 5))
    first, second = bank.layer(0), bank.layer(1)
    assert first is bank.layer(0)
    assert first.starts is second.starts
    assert first.lens is second.lens is bank.lens
    assert first.k.data_ptr() == bank.layer(0).k.data_ptr()
    with pytest.raises(IndexError):
        bank.layer(2)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_copies_are_independent(bank: PrefixBank, duplicate: object) -> None:
    bank.add("a", random_kv(bank.geometry, 5))
    bank.layer(0)
    before = state(bank)
    twin = duplicate(bank)  # type: ignore[operator]
    assert state(twin) == before
    twin.remove("a")
    twin.add("b", random_kv(bank.geometry, 9))
    assert state(bank) == before
    bank.add("c", random_kv(bank.geometry, 3))
    assert twin.names == ["b"]
    assert twin.layer(0).k.data_ptr() != bank.layer(0).k.data_ptr()


def test_bank_made_in_inference_mode_works_outside() -> None:
    with torch.inference_mode():
        bank = PrefixBank.for_model(MODEL)
        bank.add("a", random_kv(bank.geometry, 20))
        bank.remove("a")
        assert not bank.lens.is_inference()
    before = bank.memory_usage.allocated
    bank.add("b", random_kv(bank.geometry, 5))  # into the memory made in inference mode
    assert bank.memory_usage.allocated == before + 8
    assert not bank.layer(0).k.is_inference()


def test_check_model(bank: PrefixBank) -> None:
    bank.check_model(MODEL)
    bank.check_model(tiny())
    with pytest.raises(IncompatiblePrefix, match="geometry is 2 layers of 2 kv heads of 8, the model's is 3 layers"):
        bank.check_model(tiny(num_hidden_layers=3))
    with pytest.raises(IncompatiblePrefix, match=r"dtype is torch.float32, the model's is torch.bfloat16"):
        bank.check_model(tiny().to(torch.bfloat16))
    with pytest.raises(IncompatiblePrefix, match="weights"):
        bank.check_model(tiny(seed=1))
    with pytest.raises(IncompatiblePrefix, match="config"):
        bank.check_model(tiny("mistral"))


def test_a_part_that_the_model_does_not_have(bank: PrefixBank) -> None:
    bank.add("a", random_kv(bank.geometry, 4))
    for call in (
        lambda: bank.layer(0, "encoder"),
        lambda: bank.prefix_len("a", "cross"),
        lambda: bank.key_values("a", "encoder"),
        lambda: bank.plan(["a"], "encoder"),
    ):
        with pytest.raises(PrefixAttnError, match=r"part: expected one of \['decoder'\]"):
            call()


def test_ids_and_names_in_arrays(bank: PrefixBank) -> None:
    bank.add("a", random_kv(bank.geometry, 4))
    for tasks in (np.array(["a", "a"]), np.array([0, 0]), np.array(["a", None]), [np.str_("a"), np.int64(-1)]):
        assert bank.task_ids(tasks).tolist() == bank.task_ids(list(tasks)).tolist()
    with pytest.raises(DTypeError, match=r"task_ids\[0\]"):
        bank.task_ids(np.array([[0]]))


def test_a_message_lists_some_of_many_tasks() -> None:
    bank = PrefixBank.for_model(tiny())
    for i in range(25):
        bank.add(f"task {i}", random_kv(bank.geometry, 1))
    for ask in (lambda: bank.task_ids(["x"]), lambda: bank.remove("x"), lambda: bank.task_ids([99])):
        with pytest.raises(UnknownTask, match=r"task 19'\] and 5 more, got"):
            ask()
