"""``prefix-attn doctor``."""

from __future__ import annotations

import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import transformers

from prefix_attn import dispatch
from prefix_attn.cli import doctor
from prefix_attn.dispatch import BACKENDS
from tests.cli.conftest import Run


def test_doctor_says_what_is_here(run: Run) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for text in ("Versions", "Devices", "Backends", torch.__version__, transformers.__version__, *BACKENDS):
        assert text in result.stdout
    assert "yes, and taken by default" in result.stdout
    assert "supported" in result.stdout
    if not torch.cuda.is_available():
        assert "no: the tensors are on the CPU" in result.stdout


def test_doctor_says_how_decode_would_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, and as on a GPU: 64 rows over one prefix of 8192 tokens read 2.28 GB if each has its copy."""
    assert "13.5x" in run("doctor").stdout
    monkeypatch.setattr(
        dispatch, "choose", lambda call, backend="auto": dispatch.BackendChoice.of(call, "triton", "here")
    )
    steps = list(zip(*(column.cells for column in doctor.decode_steps().columns), strict=True))
    assert [step[3] for step in steps] == ["inline"] * 3 + ["grouped"] * 3
    assert "grouping saves" in str(steps[-1][4])


def test_the_supported_range_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"transformers{doctor.TRANSFORMERS}" in project["dependencies"]


@pytest.mark.parametrize(("version", "says"), [("5.17.0", "supported"), ("5.25.1", "NOT SUPPORTED"), ("4.57", "NOT")])
def test_an_unsupported_transformers_is_said(version: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: version)
    assert doctor.remark("transformers").startswith(says)


def test_a_module_in_the_place_of_the_kernels_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: ModuleSpec(name, None, origin="/here/kernels/__init__.py"))
    assert doctor.kernels_remark().startswith("SHADOWED by /here/kernels/__init__.py")
    folder = ModuleSpec("kernels", None, is_package=True)
    folder.submodule_search_locations = ["/here/kernels"]
    monkeypatch.setattr(doctor, "find_spec", lambda name: folder)
    assert "a folder of this name is here, which transformers does not take for it" in doctor.kernels_remark()
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.kernels_remark() == "optional, used by transformers"
