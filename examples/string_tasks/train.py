"""Train a small model on six string tasks, then one prefix per task that replaces the instruction.

1. The base model learns ``reverse|abc>`` to ``cba`` for six tasks at once; the task's name is the
   instruction.
2. The base model is frozen. For each task, PEFT trains a prefix on ``abc>`` to ``cba``: the instruction is
   gone, and only the prefix can say what to do.
3. Held-out accuracy, exact match of greedy generation, is measured with the instruction, without it, and with
   the prefix in its place.
"""

import json
import platform
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from characters import MAX_LENGTH, build_tokenizer
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from rich.console import Console
from rich.table import Table
from tasks import (
    TASKS,
    Task,
    draw_input,
    held_out_inputs,
    prompt_with_instruction,
    prompt_without_instruction,
)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

BASE_LINES, BASE_RATE = 128, 2e-3
PREFIX_LINES, PREFIX_RATE = 64, 1e-2
HELD_OUT_LINES = 100
IGNORED_LABEL = -100
FOLDER = Path("examples/string_tasks")

Line = tuple[str, str]
"""A prompt and its answer."""


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A Llama of 0.8 million random weights, with two query heads to a key head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def draw_instructed_line(rng: random.Random) -> Line:
    """A training line of a random task, with the task's instruction."""
    task = rng.choice(TASKS)
    text = draw_input(task, rng, held_out=False)
    return prompt_with_instruction(task, text), task.solve(text)


def draw_bare_line(task: Task, rng: random.Random) -> Line:
    """A training line of one task, without instruction."""
    text = draw_input(task, rng, held_out=False)
    return prompt_without_instruction(text), task.solve(text)


def collate(lines: list[Line], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Token ids, mask and labels ``[lines, tokens]``, padded on the right; only answer and end are labelled.

    Padding goes on the right because PEFT's training pass counts positions from the first column.
    """
    ids, labels = [], []
    for prompt, answer in lines:
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt_ids + answer_ids))
        labels.append(torch.tensor([IGNORED_LABEL] * len(prompt_ids) + answer_ids))
    lengths = torch.tensor([len(row) for row in ids])
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=int(tokenizer.pad_token_id)),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


def fit(
    model: torch.nn.Module,
    draw_batch: Callable[[], dict[str, Tensor]],
    *,
    steps: int,
    rate: float,
    title: str,
) -> float:
    """Minimise the cross-entropy of the labels over the weights that require a gradient; returns seconds."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    started = time.perf_counter()
    model.train()
    with trange(steps, desc=title) as bar:
        for _ in bar:
            loss: Tensor = model(**draw_batch()).loss
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    model.eval()
    return time.perf_counter() - started


def train_base(steps: int, seed: int, folder: Path) -> float:
    """Train the base model on all six tasks and save it with its tokenizer; returns seconds."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)

    def draw_batch() -> dict[str, Tensor]:
        return collate([draw_instructed_line(rng) for _ in range(BASE_LINES)], tokenizer)

    seconds = fit(model, draw_batch, steps=steps, rate=BASE_RATE, title="base model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return seconds


def train_prefix(task: Task, steps: int, seed: int, base: Path, folder: Path) -> float:
    """Train one task's prefix on the frozen base model and save it as PEFT does; returns seconds."""
    torch.manual_seed(seed)
    rng = random.Random(f"{seed}/{task.name}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=task.virtual_tokens)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)

    def draw_batch() -> dict[str, Tensor]:
        return collate([draw_bare_line(task, rng) for _ in range(PREFIX_LINES)], tokenizer)

    seconds = fit(model, draw_batch, steps=steps, rate=PREFIX_RATE, title=f"prefix {task.name}")
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card is an unfilled form
    return seconds


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Tokenizer, prompts: list[str], answers: list[str]) -> float:
    """Percentage of prompts that greedy generation answers exactly, end included."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    generated = model.generate(**batch, max_new_tokens=12, do_sample=False)
    texts = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    correct = [text == answer for text, answer in zip(texts, answers, strict=True)]
    return 100 * correct.count(True) / len(correct)


def evaluate(task: Task, seed: int, base: Path, adapter: Path) -> dict[str, float]:
    """Held-out accuracy in percent with the instruction, without it, and with the prefix instead of it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    inputs = held_out_inputs(task, HELD_OUT_LINES, seed)
    answers = [task.solve(text) for text in inputs]
    instructed = [prompt_with_instruction(task, text) for text in inputs]
    bare = [prompt_without_instruction(text) for text in inputs]
    return {
        "base_with_instruction": accuracy(model, tokenizer, instructed, answers),
        "base_without_instruction": accuracy(model, tokenizer, bare, answers),
        "base_with_prefix": accuracy(PeftModel.from_pretrained(model, adapter), tokenizer, bare, answers),
    }


def write_held_out(path: Path, seed: int) -> None:
    """Write one JSON line per held-out input: the task, the prompt without instruction, the answer."""
    lines = [
        {"task": task.name, "prompt": prompt_without_instruction(text), "answer": task.solve(text)}
        for task in TASKS
        for text in held_out_inputs(task, HELD_OUT_LINES, seed)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def print_report(report: dict[str, Any]) -> None:
    """Print the accuracies of a report as a table."""
    table = Table("task", title="Held-out accuracy, percent")
    for heading in ("with instruction", "without", "with prefix", "virtual tokens", "seconds"):
        table.add_column(heading, justify="right")
    for name, row in report["tasks"].items():
        found = row["accuracy"]
        table.add_row(
            name,
            *(f"{found[key]:.0f}" for key in found),
            str(row["virtual_tokens"]),
            f"{row['seconds']:.0f}",
        )
    Console().print(table)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; adapters name OUT/model as their base.")] = FOLDER,
    steps: Annotated[int, typer.Option(help="Base model steps, 128 lines each; 0 keeps OUT/model.")] = 4000,
    prefix_steps: Annotated[int, typer.Option(help="Steps of each prefix, 64 lines each.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of weights, training lines and held-out lines.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train a base model that obeys instructions, then a prefix per task that does without them.

    The base model answers "reverse|abc>" with "cba". A prefix makes the same frozen model answer "abc>" with
    "cba". Writes OUT/model, OUT/adapters/TASK, OUT/heldout.jsonl and OUT/report.json.

    Run it from the root of the checkout, so that the path by which adapters name their base holds everywhere.

    Everything, in about 20 minutes on two cores: python examples/string_tasks/train.py

    New prefixes for the model at hand: python examples/string_tasks/train.py --steps 0

    A look at the machinery, in a minute: python examples/string_tasks/train.py --steps 100 --prefix-steps 20
    --out build/string_tasks
    """
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    report_path, base = out / "report.json", out / "model"
    if steps:
        trained = {"steps": steps, "seed": seed, "seconds": round(train_base(steps, seed, base), 1)}
    else:
        trained = json.loads(report_path.read_text())["base_model"]
    rows = {}
    for task in TASKS:
        adapter = out / "adapters" / task.name
        seconds = train_prefix(task, prefix_steps, seed, base, adapter)
        rows[task.name] = {
            "virtual_tokens": task.virtual_tokens,
            "steps": prefix_steps,
            "seed": seed,
            "seconds": round(seconds, 1),
            "accuracy": evaluate(task, seed, base, adapter),
        }
    packages = ("torch", "transformers", "peft", "tokenizers", "safetensors")
    report = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "threads": threads,
        "held_out_lines": HELD_OUT_LINES,
        "base_model": trained,
        "tasks": rows,
    }
    write_held_out(out / "heldout.jsonl", seed)
    report_path.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)


if __name__ == "__main__":
    typer.run(main)
