"""Installed in any way, ``prefix_attn.kernels`` works and PyPI's ``kernels`` is not shadowed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: What a user of an installed package relies on: kernels, benchmarks, the shipped example, the command line.
SMOKE = """
import prefix_attn, pathlib
from prefix_attn.kernels import decode, prefill
from prefix_attn.benchmarks import compare, peers
home = pathlib.Path(prefix_attn.__file__).parent
assert (home / "string_tasks" / "model" / "model.safetensors").is_file()
assert home.is_relative_to({home!r}), home
from prefix_attn.cli.main import app
"""

#: transformers probes for PyPI's ``kernels`` when a model is made.
TRANSFORMERS = """
import transformers
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
config = transformers.LlamaConfig(**sizes)
transformers.AutoModelForCausalLM.from_config(config)
"""


def pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *args]
    subprocess.run(command, check=True, cwd=ROOT)


def python(script: str, cwd: Path, *path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_what_it_should(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = (
        "kernels/decode.py",
        "kernels/cpu/attention.cpp",
        "string_tasks/heldout.jsonl",
        "benchmarks/compare.py",
        "py.typed",
    )
    assert {f"prefix_attn/{name}" for name in wanted} <= names
    assert not [
        name for name in names if name.startswith(("prefix_attn/benchmarks/results", "prefix_attn/benchmarks/fig"))
    ]
    strangers = {name.split("/")[0] for name in names} - {"prefix_attn"}
    assert all(name.endswith(".dist-info") for name in strangers), strangers


def test_wheel(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    python(SMOKE.format(home=str(tmp_path / "site")), tmp_path, tmp_path / "site")


def test_a_wheel_made_of_an_sdist_holds_the_same(wheel: Path, tmp_path: Path) -> None:
    script = f"import hatchling.build as b; print(b.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    pip("wheel", str(next(tmp_path.glob("*.tar.gz"))), "--no-deps", "--no-build-isolation", "-w", str(tmp_path))
    again = next(tmp_path.glob("*.whl"))
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_pip_install(tmp_path: Path) -> None:
    pip("install", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site"), ".")
    python(SMOKE.format(home=str(tmp_path / "site")), tmp_path, tmp_path / "site")


def test_editable_install(tmp_path: Path) -> None:
    """An editable install is a path in a .pth file; ``site`` reads it as the interpreter does at start."""
    pip("install", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site"), "--editable", ".")
    script = f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n" + SMOKE.format(home=str(ROOT))
    python(script, tmp_path)


def test_plain_checkout() -> None:
    python(SMOKE.format(home=str(ROOT)), ROOT, ROOT)


def test_transformers_imports_from_the_repository_root() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "kernels/__init__.py would shadow PyPI's package 'kernels'"
    python(TRANSFORMERS, ROOT, ROOT)


def test_transformers_imports_from_the_repository_root_with_kernels_installed(tmp_path: Path) -> None:
    pip("install", "--no-deps", "--target", str(tmp_path), "kernels")
    found = f"import kernels; assert kernels.__file__.startswith({str(tmp_path)!r}), kernels.__file__\n"
    python(found + TRANSFORMERS, ROOT, ROOT, tmp_path)
