"""The CPU kernel, compiled on first use for one head dim and dtype and kept in a cache folder.

``$PREFIX_ATTN_CACHE``, else ``$XDG_CACHE_HOME/prefix_attn``, else ``~/.cache/prefix_attn``. ``$CXX`` names the
compiler, else the first of `COMPILERS` that is there.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

import prefix_attn.kernels

SOURCES = Path(next(iter(prefix_attn.kernels.__path__))) / "cpu"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
ELEMENTS = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}


class CompileError(RuntimeError):
    """There is no compiler, or it fails; the message says how."""


@cache
def library(head_dim: int, dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel for one head dim and dtype; takes a second or two where the cache has none.

    Raises:
        CompileError: it cannot be had.
    """
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or [*filter(None, map(shutil.which, COMPILERS))][:1]
    except ValueError as error:
        raise CompileError(f"CXX: expected a command, got {os.environ['CXX']!r} ({error})") from error
    if not compiler:
        raise CompileError(f"no C++ compiler ({', '.join(COMPILERS)}) is on the PATH; install one, or set CXX")
    variant = f"-DHEAD_DIM={head_dim}", f"-DELEMENT={ELEMENTS[dtype]}"
    command = [*compiler, *FLAGS, *variant, str(SOURCES / "attention.cpp")]
    name = f"attention-{head_dim}-{ELEMENTS[dtype].lower()}-{_key(*compiler, *FLAGS, *variant)}.so"
    try:
        path = cache_folder() / name
        there = path.exists()
    except (OSError, RuntimeError) as error:  # no right to look, or no home at all
        raise CompileError(f"{error}; set PREFIX_ATTN_CACHE to a folder of yours") from error
    if there:
        with suppress(OSError):  # cut off, or of another system: compiled anew
            return ctypes.CDLL(str(path))
    _compile(command, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(f"{path} cannot be loaded: {error}") from error


@cache
def missing(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why `library` cannot be had on this machine, or None; not tried again in this process."""
    try:
        library(head_dim, dtype)
    except CompileError as error:
        return str(error)
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if folder := os.environ.get("PREFIX_ATTN_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefix_attn"


def _key(*command: str) -> str:
    """What the machine code depends on: source, command, and this processor, since -march=native means it."""
    processor = Path("/proc/cpuinfo")
    features = {line for line in processor.read_text().splitlines() if line.startswith(("flags", "Features"))} if (
        processor.exists()
    ) else {platform.processor()}  # fmt: skip
    parts = [*(file.read_text() for file in sorted(SOURCES.iterdir())), *command, platform.machine(), *sorted(features)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    """Compile to ``path``, which appears when it is complete: other processes may want the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            try:
                done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
            except OSError as error:
                raise CompileError(f"{command[0]} cannot be run: {error}; set CXX to a C++ compiler") from error
            if done.returncode != 0:
                raise CompileError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
            with unfinished.open("rb") as compiled:
                os.fsync(compiled.fileno())  # else the name could outlive a loss of power, and not what it names
            os.replace(unfinished, path)
    except OSError as error:
        raise CompileError(f"{error}; set PREFIX_ATTN_CACHE to a folder of yours") from error
