"""The plan: every query row of a row with a prefix is in exactly one tile, of its task, whatever the ids are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prefix_attn as pa
from prefix_attn.plan import TILE_ROWS, BatchPlan, RowTiles, most_tiles, row_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def integers(values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """On the device that runs kernels here."""
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def check(task_ids: list[int], lens: list[int], rows: int, tile_rows: int) -> RowTiles:
    ids, lengths = integers(task_ids), integers(lens)
    tiles = row_tiles(ids, lengths, rows, tile_rows)
    shared = [t if 0 <= t < len(lens) and lens[t] > 0 else -1 for t in task_ids]
    assert tiles.planned.tolist() == shared
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in tiles)
    assert tiles.members.shape == (most_tiles(len(task_ids), len(lens), rows, tile_rows), tile_rows)
    found: Counter[tuple[int, int]] = Counter()
    for task, members in zip(tiles.tasks.tolist(), tiles.members.tolist(), strict=True):
        inside = [x for x in members if x >= 0]
        assert members == inside + [-1] * (tile_rows - len(inside))
        assert bool(inside) == (task >= 0)
        assert all(shared[x // rows] == task for x in inside)
        found.update(divmod(x, rows) for x in inside)
    assert found == {(b, r): 1 for b, t in enumerate(shared) if t >= 0 for r in range(rows)}
    full = -(-torch.bincount(torch.tensor([t for t in shared if t >= 0], dtype=torch.long)) * rows // tile_rows)
    assert int((tiles.tasks >= 0).sum()) == int(full.sum()), "no more tiles than needed are used"
    return tiles


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_row_is_in_one_tile_of_its_task(data: st.DataObject) -> None:
    lens = data.draw(st.lists(st.sampled_from([-1, 0, 1, 20, 3000]), max_size=6))
    ids = st.integers(-2, len(lens) + 1) | st.sampled_from([0, -1])  # removed, unknown and missing tasks among them
    task_ids = data.draw(st.lists(ids, max_size=150))
    check(
        task_ids, lens, data.draw(st.sampled_from([1, 3, 4, 8, 28, 64, 71])), data.draw(st.sampled_from([16, 64, 128]))
    )


@pytest.mark.parametrize("count", [63, 64, 65, 400])
def test_tile_edges(count: int) -> None:
    check([0] * count, [5], 1, TILE_ROWS)
    check([1, 0] * count + [-1] * 3, [5, 7, 9], 1, TILE_ROWS)


def test_tasks_of_one_row_fill_the_table() -> None:
    assert (check(list(range(64)), [9] * 64, 4, TILE_ROWS).tasks >= 0).all()


def test_rows_of_a_task_keep_their_order() -> None:
    tiles = check([1, 0, 1, -1, 0], [2, 2], 2, 16)
    assert [[x for x in m if x >= 0] for m in tiles.members.tolist()] == [[2, 3, 8, 9], [0, 1, 4, 5]]


def test_a_plan_is_worked_out_once_per_number_of_rows() -> None:
    plan = BatchPlan(integers([0, 0]), integers([4]))
    assert plan.tiles(4) is plan.tiles(4)
    assert plan.tiles(4) is not plan.tiles(8)


def test_tiles_of_the_inference_mode_serve_training_too() -> None:
    """Autograd cannot save tensors that were made there."""
    with torch.inference_mode():
        ids, lens = integers([0, 0]), integers([4])
        tiles = BatchPlan(ids, lens).tiles(4)
    assert not any(x.is_inference() for x in tiles)


def test_what_a_graph_records_stays_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, lens = integers([0, 0]), integers([4])

    def capturing(state: bool) -> None:
        monkeypatch.setattr("prefix_attn.plan.recording", lambda tensor: state)

    capturing(True)
    inside = BatchPlan(ids, lens)
    recorded = inside.tiles(4)
    assert inside.tiles(4) is recorded
    capturing(False)
    outside = BatchPlan(ids, lens)
    assert inside.tiles(4) is not recorded
    assert inside.tiles(4) is not inside.tiles(4)
    computed = outside.tiles(4)
    capturing(True)
    assert inside.tiles(4) is recorded
    assert outside.tiles(4) is computed
    assert outside.tiles(8) is not outside.tiles(8)
    capturing(False)
    assert outside.tiles(8) is outside.tiles(8)


def test_a_plan_is_compiled_without_a_break() -> None:
    """Made within, it is worked out once for all layers; made outside and asked within, it keeps nothing."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(sum(node.target is torch.ops.prefix_attn.row_tiles for node in graph.graph.nodes))
        return graph

    def layers(plan: BatchPlan) -> torch.Tensor:
        return plan.tiles(4).members + plan.tiles(4).members

    ids, lens = integers([0, 0]), integers([4])
    expected = layers(BatchPlan(ids, lens))
    torch.compiler.reset()
    inside = torch.compile(lambda ids, lens: layers(BatchPlan(ids, lens)), backend=backend, fullgraph=True)
    assert torch.equal(inside(ids, lens), expected)
    plan = BatchPlan(ids, lens)
    assert torch.equal(torch.compile(layers, backend=backend, fullgraph=True)(plan), expected)
    assert not plan._tiles
    assert graphs == [1, 2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opcheck(dtype: torch.dtype) -> None:
    ids, lens = integers([1, -1, 0, 7, 1], dtype), integers([4, 5, 0])
    torch.library.opcheck(torch.ops.prefix_attn.row_tiles.default, (ids, lens, 4, 16, 3))


def test_without_kernels_a_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(pa.BackendUnavailable, match="on the CPU, where Triton only interprets"):
        BatchPlan(integers([0, 0]).cpu(), integers([4]).cpu()).tiles(4)


def test_ids_may_be_wide_and_strided() -> None:
    ids, lens = integers([[0, 9], [2**40, 9], [0, 9]], torch.int64), integers([4])
    assert row_tiles(ids[:, 0], lens, 1, 16).planned.tolist() == [0, -1, 0]


def test_a_plan_of_another_batch_is_refused() -> None:
    k = torch.zeros(1, 3, 16, device=DEVICE)
    prefix, x = pa.PrefixKV.pack([(k, k)]), torch.zeros(2, 1, 1, 16, device=DEVICE)
    plan = BatchPlan(integers([0]), prefix.lens)
    with pytest.raises(pa.ShapeError, match="plan"):
        pa.prefix_attention(x, x, x, prefix, [0, 0], plan=plan)
