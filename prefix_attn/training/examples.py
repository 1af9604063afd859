"""Examples of tasks: checked, as tokens of a model, and shared out between training and scoring."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from prefix_attn.bank.names import check_name
from prefix_attn.bank.tokens import tokenised
from prefix_attn.errors import ContextOverflow, IncompatiblePrefix

#: PyTorch's label of what is no answer.
NOT_SCORED = -100


@dataclass(frozen=True)
class Example:
    """What a task's prefix shall make of a prompt."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class TokenisedExample:
    """An example as token ids ``[len]``, and labels of which only the answer's are scored."""

    task: str
    ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, index: int, example: Example, tokenizer: Any, end: int | None, room: int | None) -> TokenisedExample:
        """Tokens of an example, the ``index``-th, and ``end``; as many as ``room`` at most."""
        prompt = tokenised(tokenizer, example.prompt, verbose=False)
        joined = tokenised(tokenizer, example.prompt + example.answer, verbose=False)
        if joined[: len(prompt)] == prompt:
            answer = joined[len(prompt) :]
        else:  # prompt and answer share a token; alone, an answer may get a space in front of it
            answer = list(tokenizer(example.answer, add_special_tokens=False, verbose=False)["input_ids"])
        if end is not None:
            answer.append(end)
        if not prompt or not answer:
            raise IncompatiblePrefix(
                f"examples[{index}]: expected a prompt and an answer of at least one token each, got {example}"
            )
        if room is not None and len(prompt) + len(answer) > room:
            raise ContextOverflow(
                f"examples[{index}]: a prompt of {len(prompt)} tokens and an answer of {len(answer)} exceed the "
                f"{max(room, 0)} positions that the model has beside the prefix; shorten it or leave it out"
            )
        labels = [NOT_SCORED] * len(prompt) + answer
        return cls(example.task, torch.tensor(prompt + answer), torch.tensor(labels))


def checked_examples(given: Sequence[Example | Mapping[str, str]]) -> list[Example]:
    """`Example`, or mappings with its fields, as examples.

    Raises:
        IncompatiblePrefix: there is none, one is none, or a task has a name that no bank takes.
    """
    if not given:
        raise IncompatiblePrefix("examples: expected at least one, got none")
    examples = [_example(i, example) for i, example in enumerate(given)]
    for i, example in enumerate(examples):
        try:
            check_name(example.task)
        except IncompatiblePrefix as error:
            raise IncompatiblePrefix(f"examples[{i}]: {error}") from error
    return examples


def _example(index: int, given: Example | Mapping[str, str]) -> Example:
    names = [field.name for field in fields(Example)]
    try:
        values = vars(given) if isinstance(given, Example) else {name: given[name] for name in names}
    except (KeyError, TypeError) as error:
        raise IncompatiblePrefix(f"examples[{index}]: expected {', '.join(names)}, got {given!r}") from error
    if not all(isinstance(value, str) for value in values.values()):
        raise IncompatiblePrefix(f"examples[{index}]: expected {', '.join(names)} to be strings, got {given!r}")
    return Example(**values)


def rows_of(
    examples: Sequence[Example], model: Any, tokenizer: Any, limit: int | None, lengths: Mapping[str, int]
) -> list[TokenisedExample]:
    """Every example as tokens of the model, with room for a prefix of its task's length."""
    size, end = model.get_input_embeddings().weight.shape[0], _end_token(model, tokenizer)
    rows = [
        TokenisedExample.of(i, example, tokenizer, end, None if limit is None else limit - lengths[example.task])
        for i, example in enumerate(examples)
    ]
    for i, row in enumerate(rows):
        if not 0 <= int(row.ids.min()) <= int(row.ids.max()) < size:
            raise IncompatiblePrefix(
                f"examples[{i}]: expected token ids below {size}, the model's vocabulary, got {int(row.ids.max())}; is "
                "the tokenizer this model's?"
            )
    return rows


def _end_token(model: Any, tokenizer: Any) -> int | None:
    """The token that ends an answer: the tokenizer's, if generation ends with it, else the first that does."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    end: int | None = tokenizer.eos_token_id
    if ends and end not in ends:
        end = ends[0]
    if end is None:
        warnings.warn("neither tokenizer nor model has an end token: answers will not end by themselves", stacklevel=3)
    return end


def by_task(rows: Sequence[TokenisedExample]) -> dict[str, list[TokenisedExample]]:
    """The rows of each task, tasks in the order of their first."""
    tasks: dict[str, list[TokenisedExample]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def split(
    rows: Sequence[TokenisedExample], held_out: float, rng: random.Random
) -> tuple[list[TokenisedExample], list[TokenisedExample]]:
    """Rows to train on, and rows that are held out: of each task its share, and never all.

    Equal rows are on one side: what is trained on is not held out.
    """
    training: list[TokenisedExample] = []
    scored: list[TokenisedExample] = []
    for of_task in by_task(rows).values():
        equal: dict[tuple[int, ...], list[TokenisedExample]] = {}
        for row in of_task:
            equal.setdefault((*row.ids.tolist(), *row.labels.tolist()), []).append(row)
        distinct = list(equal.values())
        rng.shuffle(distinct)
        count = min(len(distinct) - 1, max(1, round(held_out * len(distinct)))) if held_out else 0
        scored += chain(*distinct[:count])
        training += chain(*distinct[count:])
    return training, scored
