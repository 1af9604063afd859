"""The flash_attn backend with the package itself."""

from __future__ import annotations

import pytest
import torch

import prefix_attn as pa
from prefix_attn.backends import flash_attn, reference
from prefix_attn.checks import checked_call
from tests.cases import CASES, Case, make
from tests.tolerance import assert_close

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = flash_attn.unavailable(DEVICE)

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_equals_the_formula(case: Case) -> None:
    inputs = make(case, torch.bfloat16, DEVICE.type)
    call = checked_call(*inputs.args, **inputs.options)
    if (refused := flash_attn.refusal(call)) is not None:
        pytest.skip(f"refused: {refused}")
    out, lse = pa.prefix_attention(*inputs.args, **inputs.options, return_lse=True, backend="flash_attn")
    exact, eager = (reference.attend(call, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert_close("out", out, eager[0], exact[0])
    assert_close("lse", lse, eager[1], exact[1])
