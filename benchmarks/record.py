"""Where results go: JSON lines under ``benchmarks/results/<device>/``, each row complete in itself."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import typer

from prefix_attn.errors import PrefixAttnError

from .peers.problem import Point

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: The checkout, also where this file was reached through the package's link; in an installed wheel, the package.
ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "unknown"

#: In the name of a file of `--quick` runs.
QUICK = "-quick"


def first_gpu(command: str) -> torch.device:
    """The first GPU, made current; where there is none, the command that needs it ends with exit code 2."""
    if not torch.cuda.is_available():
        typer.echo(f"{command} needs a GPU that PyTorch can use, and finds none; nothing was run", err=True)
        raise typer.Exit(2)
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Environment:
    """The machine and the software of a run. What cannot be found out is "unknown"."""

    device: str
    driver: str
    clocks: str  # as found: this never changes a setting
    torch_version: str
    cuda_version: str
    triton_version: str
    transformers_version: str
    python_version: str
    commit: str
    dirty: bool
    date: str  # UTC
    threads: int = 0  # PyTorch's, on a CPU
    run: str = ""  # when it began, UTC: rows of one run belong together

    @classmethod
    def read(cls, device: torch.device, commit: str | None = None) -> Environment:
        """Ask the device, the packages and git; ``commit`` is for a checkout without git."""
        on_gpu = device.type == "cuda"
        found, dirty = git_state()
        now = datetime.now(UTC)
        return cls(
            device=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
            driver=nvidia_smi(device, "driver_version") if on_gpu else "none",
            clocks=nvidia_smi(device, "clocks.sm,clocks.max.sm,clocks.mem,power.limit") if on_gpu else "none",
            torch_version=torch.__version__,
            cuda_version=str(torch.version.cuda or torch.version.hip or "none"),
            triton_version=package_version("triton"),
            transformers_version=package_version("transformers"),
            python_version=platform.python_version(),
            commit=commit or found,
            dirty=dirty and commit is None,
            date=now.date().isoformat(),
            threads=0 if on_gpu else torch.get_num_threads(),
            run=now.isoformat(timespec="seconds"),
        )

    @property
    def slug(self) -> str:
        """The device's name as a folder name."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-") or UNKNOWN

    @property
    def file_name(self) -> str:
        return f"{self.date}-{self.commit}{'-dirty' if self.dirty else ''}"

    def path(self, folder: Path, quick: bool = False) -> Path:
        """Where the rows of attention go; a few points in a hurry do not stand where the whole grids do."""
        return folder / self.slug / f"{self.file_name}{QUICK if quick else ''}.jsonl"


@dataclass(frozen=True)
class Row:
    """One provider at one point.

    ``bytes`` are those this provider cannot avoid moving: with one prefix per row for a peer that replicates. The
    floor, and the fraction of it that was reached, are those of the operation: one prefix per task. Without a
    median there was no timing, and ``status`` says why; a status that starts with "ok" is a good row. ``failed``
    marks a result that is wrong, or a kernel of ours that did not run.
    """

    provider: str
    version: str
    op: str
    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    tasks: int
    m: int
    n: int
    dtype: str
    status: str
    failed: bool
    bytes: int
    flops: int
    floor_us: float
    skew: str = "even"
    ragged: bool = False
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    repeats: int | None = None  # whose median and quantiles these are
    calls: int | None = None  # timed together in each, on `sets` input sets
    sets: int | None = None
    host_us: float | None = None  # to issue one call; on a GPU
    plan_us: float | None = None  # once per batch, for all layers; not part of the median
    compile_s: float | None = None  # once per shape; not part of the median
    fraction_of_floor: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    peak_bytes: int | None = None  # what the call reads, and the most it allocates at once, its result included
    roof_bytes_per_s: float | None = None
    roof_cache_bytes_per_s: float | None = None
    roof_flops_per_s: float | None = None
    error: float | None = None
    eager_error: float | None = None
    environment: Environment | None = None

    @property
    def point(self) -> Point:
        """What makes two rows comparable."""
        return Point(**{f.name: getattr(self, f.name) for f in fields(Point)})


@dataclass(frozen=True)
class GenerationRow:
    """One provider of end-to-end generation at one point, ``rows`` prompts over ``tasks`` tasks.

    ``prefix_bytes`` is what the prefixes take over the whole batch, copies in caches included;
    ``prefix_bytes_at_once`` the most of it that exists at a time. ``peak_bytes`` is everything but the weights.
    Status and ``failed`` as in `Row`.
    """

    provider: str
    version: str
    model: str
    dtype: str
    rows: int
    tasks: int
    prefix_tokens: int
    prompt_tokens: int
    new_tokens: int
    cache: str
    status: str
    failed: bool
    repeats: int | None = None
    decode_tokens_per_s: float | None = None  # median
    decode_p20: float | None = None
    decode_p80: float | None = None
    first_token_s: float | None = None  # until every row has one
    prefill_tokens_per_s: float | None = None
    prefix_bytes: int | None = None
    prefix_bytes_at_once: int | None = None
    peak_bytes: int | None = None
    environment: Environment | None = None

    @property
    def point(self) -> tuple[object, ...]:
        """What makes two rows comparable."""
        return (self.model, self.dtype, self.rows, self.tasks, self.prefix_tokens, self.prompt_tokens, self.new_tokens,
                self.cache)  # fmt: skip

    def __str__(self) -> str:
        """The point in a few words."""
        cache = "" if self.cache == "dynamic" else f" {self.cache}"
        return f"{self.model} B={self.rows} T={self.tasks} m={self.prefix_tokens}{cache}"

    @property
    def in_full(self) -> str:
        """All of the point in words, for rows of different runs."""
        return f"{self!s}, {self.dtype}, {self.prompt_tokens} + {self.new_tokens} tokens"


AnyRow = TypeVar("AnyRow", Row, GenerationRow)

EXPECTED = "expected JSON lines written by `prefix-attn bench`"


def generation_path(path: Path) -> Path:
    """Where the rows of generation go whose attention's rows go to ``path``."""
    return path.with_name(f"{path.stem}-generate.jsonl")


def append(path: Path, rows: Iterable[DataclassInstance]) -> None:
    """Add rows to a file of JSON lines, in one write: a run that is cut leaves whole rows.

    A line that a machine left torn when it went down stays as it is; rows begin below it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ""
    for row in rows:
        flat = asdict(row)
        flat |= flat.pop("environment", None) or {}
        lines += json.dumps(flat) + "\n"
    with path.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                lines = "\n" + lines
        file.write(lines.encode())


def json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a file with their numbers. One that is torn is skipped with a warning.

    Raises:
        PrefixAttnError: no line is a JSON object.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    torn: list[int] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            flat = json.loads(line)
        except ValueError:
            flat = None
        if isinstance(flat, dict):
            found.append((number, flat))
        else:
            torn.append(number)
    if torn and not found:
        raise PrefixAttnError(f"{path}, line {torn[0]}: {EXPECTED}, got no JSON object")
    if torn:
        warnings.warn(f"{path}: skipped what is no JSON object: line {', '.join(map(str, torn))}", stacklevel=1)
    return found


def read(path: Path, kind: type[AnyRow]) -> list[AnyRow]:
    """The rows of a file; of a point that several runs measured, those of the last one. Empty if there is no file.

    Raises:
        PrefixAttnError: the file holds something else.
    """
    return _rows(path, json_lines(path), kind) if path.is_file() else []


def read_either(path: Path) -> list[Row] | list[GenerationRow]:
    """`read`, whichever of both the file holds, whatever its name.

    Raises:
        PrefixAttnError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise PrefixAttnError(f"{path}: no such file; {EXPECTED}")
    lines = json_lines(path)
    if lines and "decode_tokens_per_s" in lines[0][1]:
        return _rows(path, lines, GenerationRow)
    return _rows(path, lines, Row)


def _rows(path: Path, lines: Iterable[tuple[int, dict[str, Any]]], kind: type[AnyRow]) -> list[AnyRow]:
    latest: dict[object, dict[str, AnyRow]] = {}
    ours, theirs = {f.name for f in fields(kind)}, {f.name for f in fields(Environment)}
    needed = [f.name for f in fields(kind) if f.default is MISSING]
    for number, flat in lines:
        environment = Environment(**{name: flat[name] for name in theirs}) if theirs <= flat.keys() else None
        if missing := [name for name in needed if name not in flat]:
            raise PrefixAttnError(f"{path}, line {number}: {EXPECTED}, got no {', '.join(missing)}")
        row = kind(**{name: flat[name] for name in flat.keys() & ours}, environment=environment)
        rows = latest.setdefault(row.point, {})
        if any(before.environment != environment for before in rows.values()):
            rows.clear()  # ratios are of one run
        rows[row.provider] = row
    return [row for rows in latest.values() for row in rows.values()]


@dataclass(frozen=True)
class Notes:
    """What one run says of itself beside its rows: what it left out, and why."""

    run: str  # as in `Environment`
    notes: list[str]


def notes_path(path: Path) -> Path:
    """Where the notes of the runs lie whose rows are in ``path``."""
    return path.with_suffix(".notes")


def read_notes(path: Path) -> list[str]:
    """What every run of a results file noted, a paragraph for each; runs that noted the same share one."""
    if not notes_path(path).is_file():
        return []
    runs: dict[str, list[str]] = {}
    for _, flat in json_lines(notes_path(path)):
        runs.setdefault("; ".join(flat["notes"]), []).append(flat["run"])
    return [f"Run of {', '.join(some)}: {text}" for text, some in runs.items()]


def cpu_name() -> str:
    """The processor's own name where the system tells it (Linux), else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    name = " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", found).split())
    return name or platform.processor() or platform.machine()


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return UNKNOWN


def git_state() -> tuple[str, bool]:
    """The commit, and whether the working tree differs from it (results aside); ("unknown", False) without git."""
    if not (ROOT / ".git").exists():  # a repository further up is another project's
        return UNKNOWN, False
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    commit = output([*git, "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return UNKNOWN, False
    changes = output([*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"])
    return commit, bool(changes)


def nvidia_smi(device: torch.device, query: str) -> str:
    """Fields of the device, comma-separated; a query only."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [f"--id=GPU-{uuid}"] if uuid is not None else []
    answer = output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", *which])
    return answer.splitlines()[0] if answer else UNKNOWN


def output(command: list[str]) -> str | None:
    """What a command prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        print(f"{command[0]}: {e}", file=sys.stderr)
        return None
    return done.stdout.strip()
