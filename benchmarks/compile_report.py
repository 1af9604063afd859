"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, instructions.

Each kernel is compiled for sm_80, sm_90, sm_100 and gfx942 with every config that `kernels.config` picks, at each width
of tile and a head dimension that fills none, in each dtype, and with a relative bias; the other options at once, at the
usual head dimensions. The result goes to ``benchmarks/results/compile_report.md``, with the time that an H200
should need. ``--check`` fails when a default config spills at a head dimension up to 128, loses its tensor-core
instructions or its pipelined loads, or overflows shared memory.

    python -m benchmarks.compile_report --check
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from prefix_attn.plan import TILE_ROWS

from .predict import PROBLEMS, predict

RESULTS = Path(__file__).parent / "results"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TYPES = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2), "float32": ("fp32", 4)}

#: PTX (for NVIDIA) or assembly (for AMD) that tells which path the compiler took.
INSTRUCTIONS = {
    "mma": r"\bmma\.sync|v_mfma_",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "cp.async": r"cp\.async\.c[ag]\.",
    "cp.async narrow": r"cp\.async\.ca\.shared\.global[^;]*, 0x[48],",
    "bulk copy": r"cp\.async\.bulk",
    "wide load": r"ld\.global[^;]*\.v4\.b32|ld\.global[^;]*\.v2\.b64|global_load_dwordx4|buffer_load_dwordx4",
    "early wait": r"griddepcontrol\.wait",
    "scalar load": r"ld\.global[^;v]*\.b16 |global_load_ushort|global_load_short|buffer_load_ushort",
}

#: Kernels of the backward pass that make products.
BACKWARD = ("backward_dq", "backward_own", "backward_bank")

#: Kernels that work out a plan: integers only, whatever the head dimension.
PLAN = ("rank", "members")

#: Kernels that are launched before the one before them has ended (kernels/early_launch.py).
EARLY = ("decode", "decode_few", "grouped", "merge", *PLAN)

#: Every width of tile, and a dimension that fills none.
HEAD_DIMS = (16, 32, 64, 80, 128, 256)

#: Arguments that are int32 arrays.
_TABLES = [
    "task_ids", "starts", "lens", "kv_start", "kv_len", "planned", "ranks", "sizes", "tasks", "members", "order",
    "first", "readers", "tile_task", "tile_slot",
]  # fmt: skip
INTEGER_TABLES = {f"{x}_ptr" for x in _TABLES}

#: 32-bit registers and bytes of shared memory of one multiprocessor, and the program's fixed share of the latter.
REGISTERS, SHARED, RESERVED = 65_536, {"sm_80": 167_936, "sm_90": 233_472, "sm_100": 233_472}, 1024


@dataclass(frozen=True)
class Job:
    """One compilation.

    rows: query rows per kv head in decode; options: the kernel's optional features that are on.
    """

    kernel: str
    target: str
    head_dim: int
    dtype: str
    rows: int = 0
    group: int = 4
    options: tuple[str, ...] = ()


@dataclass
class Row:
    """What came out of one compilation; ``registers`` are VGPRs on AMD, ``spills`` bytes of stack per thread.

    predicted_us, bound: of the kernel's reference problem on an H200 (benchmarks/predict.py).
    """

    job: Job
    config: dict[str, int]
    registers: int = 0
    spills: int = 0
    shared: int = 0
    blocks: int = 0
    predicted_us: float | None = None
    bound: str = ""
    instructions: dict[str, int] = field(default_factory=dict)
    error: str = ""


def jobs(quick: bool) -> list[Job]:
    """Every kernel and config on every target; with ``quick`` the usual head dimensions in bfloat16."""
    if quick:
        return [
            *(job for target in TARGETS for job in shapes(target, 128, "bfloat16")),
            *(job for target in TARGETS for job in shapes(target, 64, "bfloat16", ("bias",))),
        ]
    found = []
    for target, head_dim in product(TARGETS, HEAD_DIMS):
        for dtype in TYPES:
            found += shapes(target, head_dim, dtype)
            if dtype != "float16":  # which differs from bfloat16 by the name of its instructions
                found += shapes(target, head_dim, dtype, ("bias",))
        found.append(Job("decode", target, head_dim, "bfloat16", rows=4, options=("split",)))
        found.append(Job("merge", target, head_dim, "bfloat16"))
    for target, head_dim in product(TARGETS, (64, 128, 256)):
        found += shapes(target, head_dim, "bfloat16", ("window", "softcap", "sinks", "lse", "kv_start", "kv_len"))
        found.append(Job("grouped", target, head_dim, "bfloat16", rows=64))
        found.append(Job("decode", target, head_dim, "bfloat16", rows=1, group=1))
        found.append(Job("prefill", target, head_dim, "bfloat16", group=1, options=("window", "kv_start", "kv_len")))
    return found + [Job(kernel, target, 0, "int32") for target, kernel in product(TARGETS, PLAN)]


def shapes(target: str, head_dim: int, dtype: str, options: tuple[str, ...] = ()) -> list[Job]:
    """One job for each tile config that may be chosen for a head dimension and dtype."""
    few = [("decode", 4), ("decode_few", 4), ("decode", 64), ("grouped", 4)]
    kernels = [*few, *((kernel, 0) for kernel in ("prefill", *BACKWARD))]
    return [Job(kernel, target, head_dim, dtype, rows=rows, options=options) for kernel, rows in kernels]


def compile_job(job: Job, config: dict[str, int] | None = None) -> Row:
    """Compile one job, with the default config if none is given, and read the result."""
    kernel, config, constants = specialisation(job, config)
    row = Row(job, config)
    try:
        compiled = compile_for(job, kernel, config, constants)
    except Exception as e:  # the compiler's own errors, of many types; each is a row of the report
        row.error = f"{type(e).__name__}: {str(e).splitlines()[0][:120]}"
        return row
    amd = job.target.startswith("gfx")
    text = compiled.asm["amdgcn" if amd else "ptx"]
    row.instructions = {name: n for name, p in INSTRUCTIONS.items() if (n := len(re.findall(p, text)))}
    row.shared = compiled.metadata.shared
    row.registers, row.spills = amd_usage(text) if amd else cuda_usage(compiled.asm["cubin"])
    row.blocks = resident_blocks(row)
    work = predict(job.kernel.removesuffix("_few"), job.head_dim, job.dtype, job.group, job.rows, config)
    if work is not None:
        row.predicted_us, row.bound = work.time(float32=job.dtype == "float32")
    return row


def compile_for(job: Job, kernel: Any, config: dict[str, int], constants: dict[str, Any]) -> Any:
    """The kernel of a `specialisation`, compiled by Triton for the job's target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prefix_attn.kernels.launch import LAUNCH_OPTIONS

    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = argument_type(name, job)
        if name.endswith("_ptr"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    amd = job.target.startswith("gfx")
    target = GPUTarget("hip", job.target, 64) if amd else GPUTarget("cuda", int(job.target[3:]), 32)
    options = {key: config[key] for key in ("num_warps", "num_stages") if key in config} | LAUNCH_OPTIONS
    return triton.compile(source, target=target, options=options)


def specialisation(job: Job, config: dict[str, int] | None) -> tuple[Any, dict[str, int], dict[str, Any]]:
    """The jitted kernel, its tile config, and the values of its compile-time arguments."""
    from prefix_attn.kernels import backward_dkv, backward_dq, decode, grouped, merge, prefill, row_tiles
    from prefix_attn.kernels import config as configs

    early = job.target in ("sm_90", "sm_100")
    if job.kernel in PLAN:
        kernel = getattr(row_tiles, f"{job.kernel}_kernel")
        constants: dict[str, Any] = {"EARLY": early, "TILE_ROWS": TILE_ROWS}
        constants |= {name: getattr(row_tiles, name) for name in ("BLOCK_B", "BLOCK_J", "BLOCK_R")}
        present = {parameter.name for parameter in kernel.params}
        return kernel, {"num_warps": 4}, {name: x for name, x in constants.items() if name in present}
    block_d = configs.padded_head_dim(job.head_dim)
    align = min(16, job.head_dim & -job.head_dim)
    absent = {"kv_start", "kv_len", "sinks", "window", "softcap", "lse", "bias"} - set(job.options)
    constants = {"HEAD_DIM": job.head_dim, "BLOCK_D": block_d}
    if job.kernel == "merge":
        constants |= {"BLOCK_C": 8, "EARLY": early, "stride_out_dim": 1, "sinks_ptr": None, "lse_ptr": None}
        return merge.merge_kernel, {"num_warps": merge.merge_warps(8, block_d)}, constants
    itemsize = TYPES[job.dtype][1]
    few = configs.decode_rows(job.rows)
    block_m = {"decode": few, "decode_few": few, "grouped": TILE_ROWS}.get(job.kernel, 0)
    kind = "backward_dkv" if job.kernel in ("backward_own", "backward_bank") else job.kernel
    kind = f"biased_{kind}" if "bias" in job.options else kind
    config = config or asdict(configs.heuristic(kind, job.head_dim, itemsize, job.target, block_m))
    names = {"window": "window", "softcap": "softcap_inner"}
    constants |= {names.get(name, f"{name}_ptr"): None for name in absent}
    constants |= {f"stride_{x}_dim": 1 for x in ("q", "k", "v", "prefix_k", "prefix_v", "out")}
    constants |= {"GROUP": job.group, "ALIGN": align, "CAUSAL": job.kernel == "prefill" or job.rows > job.group}
    constants["BIAS_OF_SLOTS"] = False
    constants |= {"BLOCK_M": config["block_m"], "BLOCK_N": config["block_n"]}
    if job.kernel in ("prefill", "grouped"):
        constants["BLOCK_E"] = configs.edge_keys(config["block_n"])
    if job.kernel in BACKWARD:
        kernel = getattr(backward_dq if job.kernel == "backward_dq" else backward_dkv, f"{job.kernel}_kernel")
        constants |= {f"stride_{x}_dim": 1 for x in ("do", "dq", "dk", "dv")}
        present = {parameter.name for parameter in kernel.params} - {"lse_ptr"}
        return kernel, config, {name: x for name, x in constants.items() if name in present}
    if job.kernel == "prefill":
        return prefill.prefill_kernel, config, constants
    constants |= {"MIN_TILES": decode.MIN_TILES, "EARLY": early}
    dtype = getattr(torch, job.dtype)
    if job.kernel == "grouped":
        constants |= {"BLOCK_P": config["block_m"], "BLOCK_M": few}
        shape, softcap = (few, constants["BLOCK_E"], config["num_warps"]), 1.0 if "softcap" in job.options else None
        constants["ROWS"] = configs.item_rows(*shape, job.head_dim, dtype, softcap)
        present = {parameter.name for parameter in grouped.grouped_kernel.params}
        return grouped.grouped_kernel, config, {name: x for name, x in constants.items() if name in present}
    constants["SPLIT"] = "split" in job.options
    shape = config["block_m"], config["block_n"], config["num_warps"]
    constants["SLICES"] = configs.slices(*shape, job.head_dim, dtype)
    if "split" not in job.options:
        constants |= {"partial_ptr": None, "partial_lse_ptr": None}
    return decode.decode_kernel, config, constants


def argument_type(name: str, job: Job) -> str:
    """Triton's name for the type of a run-time argument."""
    if name in ("scale", "scale_log2", "softcap_inner", "bias_scale"):
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    if name in INTEGER_TABLES:
        return "*i32"
    if name in ("sinks_ptr", "lse_ptr", "delta_ptr", "partial_ptr", "partial_lse_ptr"):
        return "*fp32"
    return f"*{TYPES[job.dtype][0]}"


def cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, by the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


@cache
def cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def amd_usage(text: str) -> tuple[int, int]:
    """VGPRs and scratch bytes per lane from the metadata of AMD assembly."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    assert registers, "the assembly does not say how many registers"
    assert scratch, "the assembly does not say how much scratch"
    return int(registers[1]), int(scratch[1])


def resident_blocks(row: Row) -> int:
    """Programs that fit one NVIDIA multiprocessor, by registers, shared memory and threads; 0 for AMD."""
    if row.job.target not in SHARED:
        return 0
    warps = row.config["num_warps"]
    by_registers = REGISTERS // (-(-row.registers // 8) * 8 * 32 * warps)
    by_shared = SHARED[row.job.target] // (row.shared + RESERVED)
    return min(by_registers, by_shared, 64 // warps, 32)


def complaints(row: Row) -> list[str]:
    """Why a row must not be a default."""
    if row.error:
        return [row.error]
    from prefix_attn.kernels.config import SHARED_MEMORY

    job, ins, found = row.job, row.instructions, []
    if job.kernel in EARLY and job.target in ("sm_90", "sm_100") and not ins.get("early wait"):
        found.append("begins early, and does not wait for the kernel before")
    if row.shared > SHARED_MEMORY[job.target]:
        found.append(f"shared memory {row.shared} exceeds {SHARED_MEMORY[job.target]}")
    if row.spills and job.head_dim <= 128:
        found.append(f"spills {row.spills} bytes")
    if job.kernel in ("merge", *PLAN) or job.dtype == "float32":
        return found
    if not any(ins.get(x) for x in ("mma", "wgmma", "tcgen05")):
        found.append("no tensor-core instructions")
    wide = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(job.target)
    keys_stay = job.kernel in ("backward_own", "backward_bank")
    if wide and row.config["block_n" if keys_stay else "block_m"] >= 64 and not ins.get(wide):
        found.append(f"no {wide} for a tile of 64 rows or more")
    # Beside queries, the gradients of keys stream lse, delta and the rows of a task, four bytes each.
    narrow = 6 * row.config["num_stages"] if keys_stay else 0
    if job.target.startswith("sm_") and (not ins.get("cp.async") or ins.get("cp.async narrow", 0) > narrow):
        found.append("keys are not loaded by 16-byte cp.async")
    if ins.get("scalar load", 0) > small_loads(row):
        found.append("scalar loads")
    return found


def small_loads(row: Row) -> int:
    """Scalar loads that belong there: of queries, where a thread has one element, and of a relative bias.

    A bias takes one a score, in a loop that the compiler may copy three times.
    """
    from prefix_attn.kernels.config import decode_rows, padded_head_dim

    job, config = row.job, row.config
    threads = config["num_warps"] * (64 if job.target.startswith("gfx") else 32)
    decodes = job.kernel in ("decode", "decode_few", "grouped")
    queries = int(decodes and decode_rows(job.rows) * padded_head_dim(job.head_dim) <= threads)
    if "bias" not in job.options:
        return queries
    loops = 1 if job.kernel in ("decode", "decode_few", "backward_bank") else 2
    loops += job.kernel == "grouped"
    return queries + 3 * loops * max(1, config["block_m"] * config["block_n"] // threads)


def markdown(rows: Iterable[Row], version: str) -> str:
    """The report as a table."""
    lines = [
        "# Compile report",
        "",
        f"Triton {version}; made by `python -m benchmarks.compile_report`, without a GPU. Spills are bytes of stack "
        "per thread; blocks are programs resident on one NVIDIA multiprocessor; shared memory is in KiB; instruction "
        "counts are static.",
        "",
        "The time is predicted, not measured: what an H200 needs for the bytes and FLOPs of one problem with the row's "
        "tiles, and what bounds it (`benchmarks/predict.py`); on other targets' rows too, to compare their tiles. The "
        "problems, in the row's head dimension and dtype: "
        + ", ".join(f"{kernel} {str(point).partition(' ')[2]}" for kernel, point in PROBLEMS.items())
        + ".",
        "",
        "| kernel | target | D | dtype | options | tile | warps | stages | registers | spills | shared | blocks | "
        "instructions | H200, us | bound by | complaint |",
        "|---|---|--:|---|---|---|--:|--:|--:|--:|--:|--:|---|--:|---|---|",
    ]
    for row in rows:
        job, config = row.job, row.config
        options = [f"rows {job.rows}"] * (job.rows > 4) + [f"G {job.group}"] * (job.group != 4) + list(job.options)
        tile = f"{config['block_m']}x{config['block_n']}" if "block_m" in config else ""
        counts = ", ".join(f"{name} {n}" for name, n in row.instructions.items())
        predicted = "" if row.predicted_us is None else f"{row.predicted_us:.1f}"
        lines.append(
            f"| {job.kernel} | {job.target} | {job.head_dim or ''} | {job.dtype} | {', '.join(options)} | {tile} | "
            f"{config['num_warps']} | {config.get('num_stages', '')} | {row.registers} | {row.spills} | "
            f"{row.shared / 1024:.1f} | {row.blocks or ''} | {counts} | {predicted} | {row.bound} | "
            f"{'; '.join(complaints(row))} |"
        )
    return "\n".join(lines) + "\n"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="only D = 128, and 64 with a bias, in bfloat16")] = False,
    check: Annotated[bool, typer.Option("--check", help="fail also if a default config is unfit")] = False,
    processes: Annotated[int, typer.Option(help="compilations at a time")] = 2,
    out: Annotated[Path | None, typer.Option(help=f"folder of the report; {RESULTS} unless --quick")] = None,
) -> None:
    """What the compiler makes of every kernel: registers, spills, shared memory, instructions. No GPU is needed."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise typer.BadParameter("TRITON_INTERPRET=1: kernels are interpreted, not compiled; unset it")
    import triton

    todo = jobs(quick)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rows = list(tqdm(pool.imap(compile_job, todo), total=len(todo), unit="kernel"))
    out = out or (None if quick else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compile_report.md").write_text(markdown(rows, triton.__version__))
    unfit = [(row, why) for row in rows if (why := complaints(row))]
    for row, why in unfit:
        print(f"{row.job}: {'; '.join(why)}", file=sys.stderr)
    where = f"; {out}" if out else ""
    print(f"{len(rows)} kernels compiled by Triton {triton.__version__}, {len(unfit)} unfit{where}")
    if any(row.error for row in rows) or (check and unfit):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
