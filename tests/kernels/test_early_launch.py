"""Kernels that begin early wait before they read; where a GPU cannot, nothing of it is compiled."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import compile_report
from benchmarks.compile_report import EARLY, Job, compile_for, complaints, specialisation
from prefix_attn.kernels import config, early_launch
from tests.kernels.test_compile import run_module

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("target", "can"), [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_120", True), ("gfx942", False)]
)
def test_who_can(monkeypatch: pytest.MonkeyPatch, target: str, can: bool) -> None:
    monkeypatch.setattr(config, "target_of", lambda device: target)
    assert early_launch.early_options(CPU) == ({"EARLY": True, "launch_pdl": True} if can else {"EARLY": False})


def test_every_program_waits_before_it_reads() -> None:
    """In a process of its own, since here kernels are interpreted."""
    found = run_module("tests.kernels.test_early_launch")
    assert found.split() == [f"{kernel}:sm_80:0:reads" for kernel in EARLY] + [f"{k}:sm_90:1:waits" for k in EARLY]


def test_a_kernel_that_does_not_wait_is_unfit() -> None:
    job = Job("merge", "sm_90", 128, "bfloat16")
    row = compile_report.Row(job, {"num_warps": 1}, instructions={"wide load": 1})
    assert complaints(row) == ["begins early, and does not wait for the kernel before"]
    row.instructions["early wait"] = 1
    assert complaints(row) == []


def first_access(target: str, kernel: str) -> str:
    """How often the kernel waits, and what it does first."""
    options = ("split",) if kernel.startswith("decode") else ()
    job = Job(kernel, target, 64, "bfloat16", rows=4, options=options)
    text = compile_for(job, *specialisation(job, None)).asm["ptx"]
    first = re.search(r"griddepcontrol\.wait|ld\.global|cp\.async", text)
    assert first, text
    waits = len(re.findall(r"griddepcontrol\.wait", text))
    return f"{kernel}:{target}:{waits}:{'waits' if first[0].startswith('grid') else 'reads'}"


if __name__ == "__main__":
    print(*(first_access(target, kernel) for target in ("sm_80", "sm_90") for kernel in EARLY))
