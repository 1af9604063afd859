"""``prefix-attn doctor``: what is installed here, which backends can run, and how decode would."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from prefix_attn.cli import console

if TYPE_CHECKING:
    import torch

    from prefix_attn.types import AttentionCall

PACKAGES = ("torch", "triton", "transformers", "peft", "flash-attn")
#: Decode steps of which the doctor says how they would run: rows, tasks, tokens of a prefix; and the rows' own keys.
STEPS = ((1, 1, 128), (16, 1, 128), (64, 8, 128), (64, 8, 1024), (64, 1, 8192), (256, 8, 8192))
OWN_KEYS = 512
#: As in pyproject.toml; a test keeps them equal.
TRANSFORMERS = ">=5.17,<5.25"


def doctor() -> None:
    """Say what is installed, which devices there are, which backends can run on them, or why not, and how decode would.

    For instance:

        prefix-attn doctor

    Its output belongs into a bug report.
    """
    for rows in (versions(), devices(), backends(), decode_steps()):
        console.out.print(rows)
        console.out.print()


def versions() -> Table:
    from prefix_attn import __version__

    rows = console.table("Versions", "package", "version", "remark")
    rows.add_row("prefix-attn", __version__)
    rows.add_row("python", platform.python_version(), f"{sys.platform} {platform.machine()}")
    for name in PACKAGES:
        rows.add_row(name, installed(name) or "none", remark(name))
    rows.add_row("kernels", installed("kernels") or "none", kernels_remark())
    return rows


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def remark(name: str) -> str:
    """What to say of a package's version, if anything."""
    from packaging.specifiers import SpecifierSet

    found = installed(name)
    if name == "transformers" and found is not None:
        supported = SpecifierSet(TRANSFORMERS).contains(found, prereleases=True)
        return f"supported ({TRANSFORMERS})" if supported else f"NOT SUPPORTED: expected {TRANSFORMERS}"
    if name == "torch":
        import torch

        return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return "optional" if found is None else ""


def kernels_remark() -> str:
    """Whether transformers, which probes for the package of this name on PyPI, finds that package or a folder."""
    spec = find_spec("kernels")
    if spec is None:
        return "optional, used by transformers"
    if spec.origin is None:
        return "optional; a folder of this name is here, which transformers does not take for it"
    try:
        genuine = Path(str(distribution("kernels").locate_file("kernels"))).resolve()
    except PackageNotFoundError:
        genuine = None
    if Path(spec.origin).resolve().parent == genuine:
        return "used by transformers"
    return f"SHADOWED by {spec.origin}, which transformers takes for the package on PyPI; rename or remove it"


def devices() -> Table:
    import torch

    from prefix_attn.bank.memory import readable

    rows = console.table("Devices", "device", "name", "memory")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    threads = f"PyTorch's threads: {torch.get_num_threads()}"
    rows.add_row("cpu", f"{platform.machine()}, {threads}", readable(memory) if memory else "")
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        rows.add_row(f"cuda:{i}", f"{found.name}, compute {found.major}.{found.minor}", readable(found.total_memory))
    return rows


def backends() -> Table:
    import torch

    from prefix_attn.dispatch import BACKENDS, choose, refusal

    rows = console.table("Backends", "device", "dtype", "backend", "can run")
    probes = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        probes += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    for device, dtype in probes:
        call = probe(device, dtype)
        auto = choose(call).name
        for name in BACKENDS:
            why_not = refusal(name, call)
            answer = f"no: {why_not}" if why_not else "yes, and taken by default" if name == auto else "yes"
            rows.add_row(device, str(dtype).removeprefix("torch."), name, Text(answer))
        rows.add_section()
    return rows


def probe(device: str, dtype: torch.dtype) -> AttentionCall:
    """A small decode call: two rows, of which one has a prefix of 16 tokens."""
    import torch

    from prefix_attn.checks import checked_call
    from prefix_attn.types import PrefixKV

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    prefix = PrefixKV.pack([(zeros(2, 16, 64), zeros(2, 16, 64))])
    return checked_call(zeros(2, 4, 1, 64), zeros(2, 2, 8, 64), zeros(2, 2, 8, 64), prefix, [0, -1])


def decode_steps() -> Table:
    """How decode steps of one layer of Llama-3-8B would run on this machine's device, and what they must cost."""
    import torch

    import prefix_attn as pa
    from prefix_attn.plan import BatchPlan

    device = "cuda" if torch.cuda.is_available() else "cpu"
    title = f"Decode on {device}: a layer of Llama-3-8B in bfloat16, {OWN_KEYS} own keys a row"
    rows = console.table(title, "rows", "tasks", "prefix", "runs", "why", "MB", "GFLOP", "floor", "gain")
    rows.caption = (
        "floor: bytes at the rate of a copy, FLOPs at that of a large product; gain: over a prefix copied into every "
        "row, both at their floor, or by their bytes where no floor is known"
    )
    zero = torch.zeros(128, device=device, dtype=torch.bfloat16)  # only shapes and lengths matter
    said = ""
    for batch, tasks, m in STEPS:
        lens = torch.full((tasks,), m, dtype=torch.int32, device=device)
        ids = torch.arange(batch, dtype=torch.int32, device=device) % tasks
        packed, own = zero.expand(8, tasks * m, 128), zero.expand(batch, 8, OWN_KEYS, 128)
        prefix = pa.PrefixKV(packed, packed, lens.cumsum(0, dtype=torch.int32) - lens, lens, m)
        found = pa.explain(zero.expand(batch, 32, 1, 128), own, own, prefix, ids, plan=BatchPlan(ids, lens))
        runs, why = (found.regime.name, found.regime.reason) if found.regime else (found.backend, found.reason)
        floor = "unknown" if found.floor_us is None else f"{found.floor_us:.1f} us"
        megabytes, gflop = f"{found.cost.bytes / 1e6:.1f}", f"{found.cost.flops / 1e9:.2f}"
        said, why = why, "as above" if why == said else why
        rows.add_row(*map(str, (batch, tasks, m)), runs, Text(why), megabytes, gflop, floor, f"{found.saving:.1f}x")
    return rows
