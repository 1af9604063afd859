"""Mixed-task generation through ``model.generate``: the patched model against PEFT, which takes one task a batch.

PEFT's fair figure is the batch grouped by task, run group by group; ours is the batch as it is. Both run in this
process, alternating, on the same weights, prefixes and prompts, and must give the same tokens before they are timed.
Decode time is ``t(new tokens) - t(1 token)``, so that prompt reading is not counted in it.

    python -m benchmarks.generate                 # GPT-2-sized, 32 rows, 8 tasks, prefixes of 20, 100, 1024 tokens
    python -m benchmarks.generate --repeats 1     # a quick look
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import prefix_attn as pa

from .record import Environment, package_version

RESULTS = Path(__file__).parent / "results" / "cpu" / "generate.jsonl"
VOCABULARY, EOS = 50257, 50256


@dataclass(frozen=True)
class Row:
    """One provider at one point. Times in seconds, bytes exact."""

    provider: str
    rows: int
    tasks: int
    prefix_tokens: int
    prompt_tokens: int
    new_tokens: int
    decode_s: float
    decode_s_min: float
    decode_s_max: float
    decode_tokens_per_s: float
    prefill_s: float
    prefix_bytes: int


def main(
    rows: Annotated[int, typer.Option(help="Rows of the batch.")] = 32,
    tasks: Annotated[int, typer.Option(help="Tasks in the batch; rows are dealt to them in turn.")] = 8,
    prefix: Annotated[list[int] | None, typer.Option(help="Prefix lengths m; repeatable.")] = None,
    prompt: Annotated[int, typer.Option(help="Prompt tokens of each row.")] = 16,
    new: Annotated[int, typer.Option(help="New tokens of each row.")] = 9,
    repeats: Annotated[int, typer.Option(help="Alternations of the providers; the median is reported.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Time patched against PEFT, print a table, and append JSON lines to benchmarks/results/cpu/generate.jsonl."""
    torch.set_num_threads(threads)
    lengths = prefix or [20, 100, 1024]
    model = gpt2_sized(max(lengths) + prompt + new)
    results: list[Row] = []
    with tqdm(total=len(lengths) * (repeats + 1) * 4, unit="run", desc="generate") as progress:
        for m in lengths:
            results += measure(model, rows, tasks, m, prompt, new, repeats, progress.update)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    run = asdict(Environment.read(torch.device("cpu"))) | {
        "threads": threads, "peft_version": package_version("peft"), "model": "GPT-2-sized, random weights, float32",
    }  # fmt: skip
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(asdict(row) | run) + "\n" for row in results)
    show(results)


def gpt2_sized(positions: int) -> Any:
    """GPT-2's shape (12 layers, 12 heads of 64, 124M parameters) with random weights and room for the prefix."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=max(positions, 1024), bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS)
    return GPT2LMHeadModel(config).eval()


def measure(
    model: Any, rows: int, tasks: int, m: int, prompt: int, new: int, repeats: int, step: Callable[[], Any]
) -> list[Row]:
    """Both providers at one prefix length; raises if their tokens differ."""
    rng = torch.Generator().manual_seed(m)
    prefixes = {f"task{t}": torch.randn(12, 2, 12, m, 64, generator=rng) for t in range(tasks)}
    ids = torch.randint(0, EOS, (rows, prompt), generator=rng)
    task_of = [f"task{row % tasks}" for row in range(rows)]

    bank = pa.PrefixBank.for_model(model)
    for name, key_values in prefixes.items():
        bank.add(name, [(k, v) for k, v in key_values])
    grouped = {name: [row for row in range(rows) if task_of[row] == name] for name in prefixes}
    peft_model = with_peft(model, prefixes)

    def patched(n: int) -> torch.Tensor:
        pa.patch(model, bank)
        out: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), task_ids=task_of, **exactly(n))
        return out

    def peft(n: int) -> torch.Tensor:
        pa.unpatch(model)
        out = torch.empty(rows, prompt + n, dtype=torch.long)
        for name, members in grouped.items():
            peft_model.set_adapter(name)
            own = ids[members]
            out[members] = peft_model.generate(input_ids=own, attention_mask=torch.ones_like(own), **exactly(n))
        return out

    providers = {"prefix_attn": patched, "peft, grouped by task": peft}
    if not torch.equal(*(run(new) for run in providers.values())):
        raise SystemExit(f"m={m}: the providers' tokens differ; nothing was timed")
    seconds: dict[tuple[str, int], list[float]] = {(name, n): [] for name in providers for n in (1, new)}
    for repeat in range(repeats + 1):
        for name, run in providers.items():
            for n in (1, new):
                begin = time.perf_counter()
                run(n)
                if repeat:  # the first round warms up
                    seconds[name, n].append(time.perf_counter() - begin)
                step()
    pa.unpatch(model)
    peft_bytes = (
        max(len(g) for g in grouped.values()) * bank.memory_usage.total // tasks
    )  # one group's copies at a time
    held = {"prefix_attn": bank.memory_usage.total, "peft, grouped by task": bank.memory_usage.total + peft_bytes}
    out = []
    for name in providers:
        decode = [long - short for long, short in zip(seconds[name, new], seconds[name, 1], strict=True)]
        median = statistics.median(decode)
        out.append(Row(name, rows, tasks, m, prompt, new, median, min(decode), max(decode), rows * (new - 1) / median,
                       statistics.median(seconds[name, 1]), held[name]))  # fmt: skip
    return out


def exactly(n: int) -> dict[str, Any]:
    """Options that make generate produce n tokens, whatever they are."""
    return {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}


def with_peft(model: Any, prefixes: dict[str, torch.Tensor]) -> Any:
    """The same prefixes as PEFT adapters on the same model."""
    from peft import PrefixTuningConfig, get_peft_model

    wrapped: Any = None
    for name, key_values in prefixes.items():
        m = key_values.shape[3]
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=m, num_layers=12, token_dim=768,
                                    num_attention_heads=12, num_transformer_submodules=1)  # fmt: skip
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        with torch.no_grad():
            wrapped.prompt_encoder[name].embedding.weight.copy_(key_values.permute(3, 0, 1, 2, 4).reshape(m, -1))
        wrapped.peft_config[name].inference_mode = True
    return wrapped.eval()


def show(results: list[Row]) -> None:
    """A table with the ratio of each pair."""
    table = Table(title="Mixed-task generate on the CPU: decode, tokens/s (median)")
    for column in ("m", "rows x tasks", "prefix_attn", "PEFT, grouped", "speed-up", "prefill speed-up", "prefix held"):
        table.add_column(column, justify="right")
    for ours, peft in zip(results[::2], results[1::2], strict=True):
        table.add_row(
            f"{ours.prefix_tokens}", f"{ours.rows} x {ours.tasks}", f"{ours.decode_tokens_per_s:.1f}",
            f"{peft.decode_tokens_per_s:.1f}", f"{ours.decode_tokens_per_s / peft.decode_tokens_per_s:.2f}x",
            f"{peft.prefill_s / ours.prefill_s:.2f}x",
            f"{ours.prefix_bytes / 2**20:.1f} MiB, PEFT {peft.prefix_bytes / 2**20:.1f} MiB",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
