"""Requests of many tasks that arrive together: answered by the engine of `prefix_attn.serving`, and by PEFT.

    python -m benchmarks.serving        # four minutes; appends to benchmarks/results/<device>/serving.jsonl

A random model of GPT-2's size in float32; every request asks for its own number of tokens, greedily. The engine puts
all into one batch and lets each leave when it has its tokens. PEFT takes one task after the other, in the order in
which they arrive, the requests of a task as one batch, which runs until the longest is done. Beside them what
transformers' continuous batching does for the same prompts without any prefix. PEFT must give each request the tokens
that the engine gives it, or carries no time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich import print
from rich.table import Table

import prefix_attn as pa
from prefix_attn.hf.continuous import refuse_old_engines
from prefix_attn.serving import Engine, Request

from . import record
from .generate import gpt2_sized, random_prefixes, with_peft
from .options import RESULTS, Commit, Out, Threads, here, refuse_without_peft
from .timing import first_line

OURS, PEFT, WITHOUT = "prefix_attn, engine", "peft, task by task", "transformers, no prefix"
PROMPT, SHORTEST, LONGEST = 16, 8, 64  # tokens of a prompt; the fewest and the most of an answer


@dataclass(frozen=True)
class ServingRow:
    """One way to answer all requests; times in seconds from their arrival, means over the requests.

    first_token_s: until it has its first token; None where a batch is handed over whole.
    """

    provider: str
    version: str
    model: str
    dtype: str
    requests: int
    tasks: int
    prefix_tokens: int
    prompt_tokens: int
    new_tokens: int  # of all answers
    status: str
    seconds: float
    answer_s: float
    first_token_s: float | None
    environment: record.Environment

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds


class Answered(NamedTuple):
    """Tokens of a request's answer, and when its first and its last came."""

    tokens: list[int]
    first_s: float | None
    last_s: float


class Load:
    """The requests of one point, and the ways to answer them."""

    def __init__(self, model: Any, requests: int, tasks: int, prefix_tokens: int) -> None:
        self.model, self.device = model, model.device
        rng = torch.Generator(self.device).manual_seed(tasks)
        self.prefixes = random_prefixes(pa.PrefixBank.for_model(model), tasks, prefix_tokens, rng)
        self.prompts = torch.randint(
            0, model.config.eos_token_id, (requests, PROMPT), generator=rng, device=self.device
        )
        self.task_of = [f"task{i % tasks}" for i in range(requests)]
        lengths = random.Random(0)
        self.new = [lengths.randint(SHORTEST, LONGEST) for _ in range(requests)]

    def ours(self) -> list[Answered]:
        bank = pa.PrefixBank.for_model(self.model)
        for name, key_values in self.prefixes.items():
            bank.add(name, [(k, v) for k, v in key_values])
        pa.patch(self.model, bank)
        try:
            engine = Engine(self.model, cache_tokens=len(self.new) * (PROMPT + LONGEST + 64))
            engine.ends = []  # a random model would stop anywhere
            with engine:
                return asyncio.run(self._at_once(engine))
        finally:
            pa.unpatch(self.model)

    async def _at_once(self, engine: Engine) -> list[Answered]:
        began = time.perf_counter()

        async def answer(prompt: list[int], task: str, new: int) -> Answered:
            tokens: list[int] = []
            first = 0.0
            async for piece in engine.answer(Request(prompt, task, new)):
                first = first or time.perf_counter() - began
                tokens += piece.tokens
            return Answered(tokens, first, time.perf_counter() - began)

        asked = zip(self.prompts.tolist(), self.task_of, self.new, strict=True)
        return await asyncio.gather(*(answer(*one) for one in asked))

    def theirs(self) -> list[Answered]:
        peft = with_peft(self.model, self.prefixes)
        began, answers = time.perf_counter(), dict[int, Answered]()
        for name in self.prefixes:
            rows = [i for i, task in enumerate(self.task_of) if task == name]
            peft.set_adapter(name)
            prompts, most = self.prompts[rows], max(self.new[i] for i in rows)
            out = peft.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=most, min_new_tokens=most,
                do_sample=False,
            ).tolist()  # fmt: skip
            done = time.perf_counter() - began
            answers |= {
                i: Answered(x[PROMPT : PROMPT + self.new[i]], None, done) for i, x in zip(rows, out, strict=True)
            }
        return [answers[i] for i in range(len(self.new))]

    def without(self) -> list[Answered]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = ContinuousBatchingConfig(page_size=64, num_blocks=len(self.new) * 3, allow_block_sharing=False)
        wanted = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        with self.model.continuous_batching_context_manager(
            generation_config=wanted, continuous_batching_config=config
        ) as manager:
            while manager.batch_processor is None:
                time.sleep(0.01)
            began, seconds, answers = time.perf_counter(), dict[str, float](), dict[str, list[int]]()
            names = [
                manager.add_request(prompt, max_new_tokens=new)
                for prompt, new in zip(self.prompts.tolist(), self.new, strict=True)
            ]
            while len(answers) < len(names):
                result = manager.get_result(timeout=600)
                seconds[result.request_id] = time.perf_counter() - began
                answers[result.request_id] = result.generated_tokens
        return [Answered(answers[name], None, seconds[name]) for name in names]


def measure(
    model: Any, requests: int, tasks: int, prefix_tokens: int, environment: record.Environment
) -> list[ServingRow]:
    """Every way at one point."""
    load = Load(model, requests, tasks, prefix_tokens)
    ways: dict[str, Callable[[], list[Answered]]] = {OURS: load.ours, PEFT: load.theirs, WITHOUT: load.without}
    versions = {
        OURS: pa.__version__, PEFT: f"peft {record.package_version('peft')}",
        WITHOUT: record.package_version("transformers"),
    }  # fmt: skip
    found: dict[str, list[Answered]] = {}
    rows = []
    for provider, way in ways.items():
        status, answers = "ok", list[Answered]()
        try:
            answers = found[provider] = way()
        except Exception as e:  # whatever a way raises is its answer
            status = f"refused: {type(e).__name__}: {first_line(e)}"
        if provider == PEFT and status == "ok":
            wrong = differing(found[OURS], answers) if OURS in found else requests
            status = f"wrong: {wrong} of {requests} answers are not those of {OURS}" if wrong else status
        rows.append(row_of(load, model, provider, versions[provider], status, answers, environment))
    return rows


def differing(one: Sequence[Answered], other: Sequence[Answered]) -> int:
    """How many answers are not the same tokens."""
    return sum(a.tokens != b.tokens for a, b in zip(one, other, strict=True))


def row_of(
    load: Load, model: Any, provider: str, version: str, status: str, answers: list[Answered],
    environment: record.Environment,
) -> ServingRow:  # fmt: skip
    firsts = [answer.first_s for answer in answers if answer.first_s is not None]
    timed = status == "ok"
    return ServingRow(
        provider, version, "GPT-2", str(model.dtype).removeprefix("torch."), len(load.new), len(load.prefixes),
        next(iter(load.prefixes.values())).shape[3], PROMPT, sum(load.new), status,
        max(answer.last_s for answer in answers) if timed else 0.0,
        fmean(answer.last_s for answer in answers) if timed else 0.0,
        fmean(firsts) if timed and firsts else None, environment,
    )  # fmt: skip


def table(rows: list[ServingRow]) -> Table:
    shown = Table(
        "tasks", "", "tokens/s", "answered, s", "first token, s", title="Means over the requests, from their arrival"
    )
    for row in rows:
        cells = [row.status, "", ""]
        if row.status == "ok":
            first = "" if row.first_token_s is None else f"{row.first_token_s:.2f}"
            cells = [f"{row.tokens_per_s:.0f}", f"{row.answer_s:.1f}", first]
        shown.add_row(str(row.tasks), row.provider, *cells, end_section=row.provider == WITHOUT)
    return shown


def main(
    requests: Annotated[int, typer.Option(min=1, help="that arrive together")] = 64,
    tasks: Annotated[str, typer.Option(help="how many tasks they belong to, one point for each")] = "1,8,64",
    prefix_tokens: Annotated[int, typer.Option(min=1, help="of each task's prefix")] = 100,
    threads: Threads = 2,
    out: Out = RESULTS,
    commit: Commit = None,
) -> None:
    """Answer the same requests in every way, print a table, and append JSON lines to <out>/<device>/serving.jsonl."""
    refuse_without_peft()
    refuse_old_engines()  # else PEFT would be timed for minutes, and compared with nothing
    device, environment = here(threads, commit)
    model = gpt2_sized(prefix_tokens + PROMPT + LONGEST, device)
    path = out / environment.slug / "serving.jsonl"
    rows = []
    for count in map(int, tasks.split(",")):
        found = measure(model, requests, count, prefix_tokens, environment)
        record.append(path, found)
        rows += found
    print(table(rows))
    print(f"appended to {path}")


if __name__ == "__main__":
    typer.run(main)
