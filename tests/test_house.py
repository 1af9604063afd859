"""Rules of the house that code alone cannot show: who imports whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "prefix_attn"

#: room -> rooms of the package it may import; leaves may import only leaves.
LEAVES = {"errors", "context", "transforms", "types", "plan", "checks"}
MAY_IMPORT = {
    "errors": set(),
    "context": set(),
    "tolerance": set(),
    "plan": {"errors", "kernels"},
    "transforms": {"errors"},
    "types": {"errors", "kernels", "plan", "transforms"},
    "checks": {"errors", "types", "plan"},
    "kernels": set(),
    "regime": LEAVES,
    "backends": LEAVES | {"kernels", "regime"},
    "dispatch": LEAVES | {"backends", "regime"},
    "ops": LEAVES | {"dispatch"},
    "cost": LEAVES | {"dispatch", "regime"},
    "attention": LEAVES | {"ops", "dispatch", "cost"},
    "bank": LEAVES | {"attention"},
    "hf": LEAVES | {"attention", "bank"},
    "training": LEAVES | {"bank", "hf"},
    "serving": LEAVES | {"bank", "hf"},
    "benchmarks": LEAVES
    | {"tolerance", "kernels", "ops", "regime", "backends", "dispatch", "cost", "attention", "bank", "hf", "training"}
    | {"serving", "string_tasks"},
    "cli": LEAVES | {"attention", "bank", "hf", "training", "serving", "dispatch", "cost", "benchmarks"},
}

#: Folders of the repository that the package reaches by a link.
LINKS = {"kernels", "benchmarks", "string_tasks"}


def room(module: str) -> str:
    """``prefix_attn.bank.storage`` -> ``bank``."""
    return [*module.split("."), ""][1]


def imports(path: Path) -> set[str]:
    """Modules of the package a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{name.name}" for name in node.names} if node.module == "prefix_attn" else set()
            found |= below or {node.module}
    return {name for name in found if name.startswith("prefix_attn.")}


def source_files() -> list[Path]:
    files = [f for f in sorted(PACKAGE.rglob("*.py")) if not LINKS & {*f.relative_to(PACKAGE).parts}]
    return [*files, *(f for room in ("kernels", "benchmarks") for f in sorted((ROOT / room).rglob("*.py")))]


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).parts
    own = parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return  # the front door re-exports everything
    allowed = MAY_IMPORT[own] | {own}
    wrong = {name for name in imports(path) if room(name) not in allowed | {"__version__"}}
    assert not wrong, f"{own} may import {sorted(allowed)}, but imports {sorted(wrong)}"


def test_kernels_need_only_torch_and_triton() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "triton", "__future__", *sys.stdlib_module_names} or name.startswith(
                    "prefix_attn.kernels"
                ), f"{path.name} imports {name}"


def test_no_pickle_anywhere() -> None:
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(name.name for name in node.names)}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}, path
            if isinstance(node, ast.Attribute) and node.attr in {"load", "save"} and isinstance(node.value, ast.Name):
                assert node.value.id != "torch", f"{path}: torch.{node.attr} pickles"


@pytest.mark.parametrize("blocked", ["triton", "transformers", "peft"])
def test_importing_the_package_needs_neither_triton_nor_transformers(blocked: str) -> None:
    """With the module made unimportable, the package imports and the op runs on the CPU."""
    script = f"""
import sys
sys.modules[{blocked!r}] = None
import torch, prefix_attn as pa
prefix = pa.PrefixKV.pack([(torch.zeros(1, 3, 16), torch.zeros(1, 3, 16))])
x = torch.zeros(1, 1, 2, 16)
assert pa.prefix_attention(x, x, x, prefix, [0]).shape == x.shape
assert "transformers" not in {{name for name, module in sys.modules.items() if module is not None}}
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
