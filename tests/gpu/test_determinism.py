"""The same launch gives the same bits, a thousand times; so does a row with ``batch_invariant``, in a thousand batches.

On a GPU with the shipped configs and sizes that fill it; elsewhere two launches in the interpreter, so that the test
itself is run.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import prefix_attn as pa
from prefix_attn.checks import checked_call
from prefix_attn.kernels.config import config_for
from tests.cases import Case, Inputs, make
from tests.kernels.calls import DEVICE, WAYS, launch

ON_GPU = DEVICE == "cuda"
TIMES = 1000 if ON_GPU else 1

#: Several tiles and chunks of everything; rows of all tasks and of none.
CASE = Case("determinism", prefix_lens=(20, 0, 17), task_ids=(-1, 0, 1, 2), q_heads=8, kv_heads=2, kv_len=18)
if ON_GPU:
    ids = tuple(b % 4 - 1 for b in range(32))
    CASE = replace(CASE, prefix_lens=(300, 0, 133), task_ids=ids, kv_len=700, head_dim=128)


def bits(x: Tensor) -> Tensor:
    """As integers, so that equal means the same bits."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32] if ON_GPU else [torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_launches_have_one_output(way: str, dtype: torch.dtype) -> None:
    case = replace(CASE, q_len=CASE.kv_len if way == "prefill" else 2)
    inputs = make(case, dtype, DEVICE)
    call = checked_call(*inputs.args, **inputs.options)
    kind, rows = way.removesuffix("_split"), 64 if way == "grouped" else 2 * call.group
    tile = config_for(kind, call.head_dim, call.q.dtype, call.q.device, rows)
    out, lse = launch(call, way, tile)
    assert bool(out.isfinite().all())
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(TIMES):
        again, lse_again = launch(call, way, tile)
        differing += (bits(again) != bits(out)).sum() + (bits(lse_again) != bits(lse)).sum()
    assert int(differing) == 0


@pytest.mark.skipif(not ON_GPU, reason="no GPU: a thousand batches are tested on the CPU in tests/test_op.py")
@pytest.mark.parametrize("q_len", [1, 40], ids=("decode", "prefill"))
def test_a_row_has_one_output_in_a_thousand_batches(q_len: int) -> None:
    case = Case("batches", prefix_lens=(20, 0, 1500), q_heads=8, kv_heads=2, q_len=q_len, kv_len=300, head_dim=128)
    row = make(replace(case, task_ids=(2,)), torch.bfloat16, DEVICE)
    strangers = make(replace(case, task_ids=tuple(b % 4 - 1 for b in range(64))), torch.bfloat16, DEVICE, seed=1)
    strangers = replace(strangers, prefix=row.prefix)
    rng = random.Random(0)
    alone = run(row)
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(TIMES):
        others = rng.sample(range(64), rng.randrange(48))
        place = rng.randint(0, len(others))
        before, after = (torch.tensor(x, dtype=torch.int64, device=DEVICE) for x in (others[:place], others[place:]))

        def insert(x: Tensor, rows: Tensor, before: Tensor = before, after: Tensor = after) -> Tensor:
            return torch.cat([rows[before], x, rows[after]])

        batch = Inputs(
            insert(row.q, strangers.q), insert(row.k, strangers.k), insert(row.v, strangers.v), row.prefix,
            insert(row.task_ids, strangers.task_ids), row.options,
        )  # fmt: skip
        differing += (bits(run(batch)[place]) != bits(alone[0])).sum()
    assert int(differing) == 0


def run(inputs: Inputs) -> Tensor:
    out = pa.prefix_attention(*inputs.args, **inputs.options, backend="triton", batch_invariant=True)
    assert isinstance(out, Tensor)
    return out
