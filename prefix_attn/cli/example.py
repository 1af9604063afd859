"""The shipped example as the demo uses it: its files, answers of a generate call, and plain PEFT to compare with."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from prefix_attn.cli.requests import cut
from prefix_attn.errors import PrefixAttnError
from prefix_attn.hf.verify import TOLERANCE

#: One prompt for every task: what to do with it is said by the prefix alone. It is in no training batch.
INPUT = "hot tea"
ANSWERS = {
    "upper": "HOT TEA", "reverse": "aet toh", "sort": "aehott", "rot13": "ubg grn", "vowels": "3", "first": "hot",
}  # fmt: skip
#: Longest answer and its end.
NEW_TOKENS = 12


class Question(NamedTuple):
    """One held-out line."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class ShippedExample:
    """The folder ``string_tasks``: a base model, six PEFT adapters, held-out lines and the report of the training."""

    folder: Path

    @classmethod
    def found(cls) -> ShippedExample:
        """The one in this package."""
        folder = Path(str(files("prefix_attn") / "string_tasks"))
        if not (folder / "model").is_dir():
            raise PrefixAttnError("string_tasks: the example's files are missing; install the wheel, or use a checkout "
                                  "on a file system with symbolic links")  # fmt: skip
        return cls(folder)

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def adapters(self) -> list[tuple[str, Path]]:
        return [(task, self.folder / "adapters" / task) for task in ANSWERS]

    @cached_property
    def questions(self) -> list[Question]:
        """All held-out lines, tasks mixed."""
        lines = (self.folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [Question(**json.loads(line)) for line in lines]
        random.Random(0).shuffle(questions)
        return questions

    def first_of_each(self, count: int) -> list[Question]:
        """The first ``count`` held-out lines of each task, mixed."""
        rows = by_task([question.task for question in self.questions]).values()
        chosen = {row for of_task in rows for row in of_task[:count]}
        return [self.questions[row] for row in sorted(chosen)]

    @cached_property
    def without_instruction(self) -> dict[str, float]:
        """Accuracy in percent of the base model without instruction and prefix, by task."""
        report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        return {task: row["accuracy"]["base_without_instruction"] for task, row in report["tasks"].items()}


class Reply(NamedTuple):
    """One row of a generate call: its tokens up to and with the end, and the logits ``[tokens, vocabulary]``."""

    text: str
    tokens: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Caller:
    """Asks through a ``generate``: that of a plain, patched or PEFT model."""

    generate: Callable[..., Any]
    tokenizer: Any
    device: torch.device

    def ask(self, prompts: Sequence[str], **kwargs: Any) -> list[Reply]:
        """Greedy replies of one call."""
        batch = self._encode(prompts)
        result = self.generate(
            **batch,
            **kwargs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = result.sequences[:, batch["input_ids"].shape[1] :].tolist()
        logits = torch.stack(result.logits, dim=1).float().cpu()  # [batch, steps, vocabulary]
        kept = [cut(tokens, NEW_TOKENS, {self.tokenizer.eos_token_id}) for tokens in new]
        texts = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return [Reply(text, tokens, row[: len(tokens)]) for text, tokens, row in zip(texts, kept, logits, strict=True)]

    def work(self, prompts: Sequence[str], new_tokens: int, **kwargs: Any) -> None:
        """One call that makes exactly ``new_tokens`` tokens a row, to be timed."""
        batch = self._encode(prompts)
        self.generate(**batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **kwargs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _encode(self, prompts: Sequence[str]) -> Any:
        batch = self.tokenizer(list(prompts), padding=True, return_tensors="pt", return_token_type_ids=False)
        return batch.to(self.device)


class Peft:
    """The same adapters in plain PEFT, which runs one task at a time.

    Args:
        model: the base model, not patched; it is wrapped in place.
        adapters: task and folder.
    """

    def __init__(self, model: Any, tokenizer: Any, adapters: Sequence[tuple[str, Path]]) -> None:
        from peft import PeftModel

        with warnings.catch_warnings():
            # PEFT asks transformers for an attribute by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            (name, path), *others = adapters
            self.model = PeftModel.from_pretrained(model, path, adapter_name=name)
        for name, path in others:
            self.model.load_adapter(path, adapter_name=name)
        self._caller = Caller(self.model.generate, tokenizer, model.device)

    def ask(self, questions: Sequence[tuple[str | None, str]]) -> list[Reply]:
        """Replies to (task, prompt) pairs in their order: one call for each task that occurs."""
        replies: dict[int, Reply] = {}
        for task, rows in by_task([task for task, _ in questions]).items():
            with self._only(task):
                found = self._caller.ask([questions[row][1] for row in rows])
            replies |= zip(rows, found, strict=True)
        return [replies[row] for row in range(len(questions))]

    def work(self, questions: Sequence[tuple[str | None, str]], new_tokens: int) -> None:
        """Make ``new_tokens`` tokens for each row, one call a task: the best that PEFT can do with mixed requests."""
        for task, rows in by_task([task for task, _ in questions]).items():
            with self._only(task):
                self._caller.work([questions[row][1] for row in rows], new_tokens)

    def _only(self, task: str | None) -> AbstractContextManager[None]:
        if task is None:
            without: AbstractContextManager[None] = self.model.disable_adapter()
            return without
        self.model.set_adapter(task)
        return nullcontext()


Key = TypeVar("Key", bound=str | None)


def by_task(tasks: Sequence[Key]) -> dict[Key, list[int]]:
    """Rows of each task."""
    rows: dict[Key, list[int]] = {}
    for row, task in enumerate(tasks):
        rows.setdefault(task, []).append(row)
    return rows


@dataclass(frozen=True)
class Comparison:
    """Replies of two runs to the same rows.

    Attributes:
        rows, equal: how many there are, and how many have equal tokens.
        difference: largest of two logits at the same row and step, up to the first step whose tokens differ.
        largest: largest logit.
    """

    rows: int
    equal: int
    difference: float
    largest: float

    @classmethod
    def of(cls, ours: Sequence[Reply], theirs: Sequence[Reply]) -> Comparison:
        difference = largest = 0.0
        for a, b in zip(ours, theirs, strict=True):
            same = [x == y for x, y in zip(a.tokens, b.tokens, strict=False)]
            steps = same.index(False) + 1 if False in same else len(same)
            difference = max(difference, float((a.logits[:steps] - b.logits[:steps]).abs().max()))
            largest = max(largest, float(b.logits.abs().max()))
        equal = sum(a.tokens == b.tokens for a, b in zip(ours, theirs, strict=True))
        return cls(len(ours), equal, difference, largest)

    @property
    def passed(self) -> bool:
        """All tokens equal, and logits as near as float32 allows (the bound of ``patch(verify=True)``)."""
        return self.equal == self.rows and self.difference <= TOLERANCE[torch.float32] * self.largest


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one CPU thread: for a model this small, several spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternate(runs: Sequence[Callable[[], None]], repeats: int, limit: float) -> list[list[float]]:
    """Seconds of each run, by turns, so that a busy machine disturbs all alike; after one turn to warm up.

    Args:
        repeats: turns that count.
        limit: seconds after which no new turn is begun, on a slow machine; one turn counts in any case.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    began = perf_counter()
    for turn in range(repeats + 1):
        if turn > 1 and perf_counter() - began > limit:
            break
        for run, taken in zip(runs, seconds, strict=True):
            started = perf_counter()
            run()
            if turn:
                taken.append(perf_counter() - started)
    return seconds
