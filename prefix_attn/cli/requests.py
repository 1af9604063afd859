"""Requests, one JSON object a line: parse them, cut them into batches, write answers in order, continue a broken run.

Nothing here needs torch. Each line of the output repeats its request (line number, task, prompt, max_new_tokens), so
that a later run can tell whether the output belongs to its input.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from prefix_attn.context import room_for_new
from prefix_attn.errors import PrefixAttnError

ANEW = "give another file, or --overwrite to start anew"


@dataclass(frozen=True)
class Line:
    """One line of the input.

    Attributes:
        number: in the file, from 1.
        task, prompt: None where the line has none, or an unusable one.
        new_tokens: the most that are asked for, by the line or by the command; None where the line is bad.
        error: why the line cannot be answered, or None.
    """

    number: int
    task: str | None = None
    prompt: str | None = None
    new_tokens: int | None = None
    error: str | None = None

    def output(self, **fields: Any) -> dict[str, Any]:
        """The object to write for this line."""
        asked = {"line": self.number, "task": self.task, "prompt": self.prompt, "max_new_tokens": self.new_tokens}
        return asked | fields


@dataclass(frozen=True)
class Row:
    """A request ready to run.

    Attributes:
        index: of its line among the input's lines.
        task: None for no prefix.
        tokens: ids of the prompt.
        prefix: tokens of the task's prefix.
        new_tokens: the most that are asked for.
        encoded: whether the prompt is for an encoder.
    """

    index: int
    task: str | None
    tokens: Sequence[int]
    prefix: int
    new_tokens: int
    encoded: bool = False

    @property
    def start(self) -> int:
        """Tokens in front of the new ones: the prompt's, or the one that a decoder with an encoder starts with."""
        return 1 if self.encoded else len(self.tokens)


@dataclass(frozen=True)
class Done:
    """What an earlier run left: complete lines, their bytes, how many are errors, and (task, made_by) of the others."""

    lines: int = 0
    size: int = 0
    failed: int = 0
    made_by: frozenset[tuple[str | None, str]] = frozenset()


def read_lines(data: bytes, new_tokens: int) -> list[Line]:
    """The lines of a JSONL file; empty ones count for the numbers, but are no requests.

    new_tokens: the most that are asked for where a line does not say.
    """
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    return [parse_line(number, line, new_tokens) for number, line in lines if line.strip()]


def parse_line(number: int, raw: bytes, new_tokens: int) -> Line:
    """Check one line; what is wrong with it is said in its ``error``."""
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Line(number, error=f"expected text in UTF-8, but byte {error.start + 1} of the line is none")
    except json.JSONDecodeError as error:
        return Line(number, error=f"expected a JSON object, got what is no JSON at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python reads
        return Line(number, error=f"expected a JSON object, but: {error}")
    if not isinstance(content, dict):
        return Line(number, error=f"expected a JSON object, got {type(content).__name__}")
    task, prompt, new = (content.get(key) for key in ("task", "prompt", "max_new_tokens"))
    problem = None
    if "prompt" not in content:
        problem = "prompt: missing"
    elif not is_text(prompt):
        problem = f"prompt: expected text, got {shown(prompt)}"
    elif task is not None and not is_text(task):
        problem = f"task: expected the name of a task, or null for no prefix, got {shown(task)}"
    elif new is not None and (type(new) is not int or new < 1):
        problem = f"max_new_tokens: expected an integer of at least 1, got {shown(new)}"
    return Line(
        number,
        task=task if is_text(task) else None,
        prompt=prompt if is_text(prompt) else None,
        new_tokens=None if problem else new or new_tokens,
        error=problem,
    )


def shown(value: Any) -> str:
    """A JSON value in a message: on one line, not long, and of ASCII characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def is_text(value: Any) -> bool:
    """Whether a JSON value is a string of real characters: a lone surrogate cannot be tokenised or written."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def finished(existing: bytes, lines: Sequence[Line]) -> Done:
    """How much of an existing output is there; a last line without its end is not counted.

    Raises:
        PrefixAttnError: the output was not made from this input.
    """
    *written, torn = existing.split(b"\n")
    failed, made_by = 0, set[tuple[str | None, str]]()
    for index, line in enumerate(written):
        start = _start_of_output(lines, index)
        if not (line.startswith(start) and line.endswith(b"}")):
            raise _foreign(index)
        failed += line.startswith(start + b', "error"')
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise _foreign(index) from error
        if "made_by" in answer:
            made_by.add((answer["task"], answer["made_by"]))
    start = _start_of_output(lines, len(written)) if torn else b""
    if not (torn.startswith(start) or start.startswith(torn)):
        raise _foreign(len(written))
    return Done(len(written), len(existing) - len(torn), failed, frozenset(made_by))


def _start_of_output(lines: Sequence[Line], index: int) -> bytes:
    """What the output of a line begins with, whether it is an answer or an error."""
    if index >= len(lines):
        raise PrefixAttnError(f"--output: the existing file has more lines than the {len(lines)} requests; {ANEW}")
    return json_line(lines[index].output())[:-1]


def _foreign(index: int) -> PrefixAttnError:
    return PrefixAttnError(
        f"--output: line {index + 1} of the existing file does not belong to this input and --max-new-tokens; {ANEW}"
    )


def json_line(output: dict[str, Any]) -> bytes:
    """One line of the output, without its end."""
    return json.dumps(output, ensure_ascii=False).encode()


def cut_into_batches(
    rows: Iterable[Row], batch_size: int, limit: int | None = None, window: int | None = None
) -> list[list[Row]]:
    """Cut rows, sorted so that those of a batch are of similar work, into batches of at most ``batch_size``.

    A batch is as wide as its longest prompt and runs for its largest ``new_tokens``. A row is never put where this
    would take it past ``limit`` positions, though it fits by itself; tasks may mix. Nor is it put where padding would
    take room in a sliding ``window``, and so hide some of its prefix from it.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (row.new_tokens, len(row.tokens))):
        if batches and len(batches[-1]) < batch_size and _fit([*batches[-1], row], limit, window):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _fit(batch: Sequence[Row], limit: int | None, window: int | None) -> bool:
    width, new = max(row.start for row in batch), max(row.new_tokens for row in batch)
    if limit is not None and new > room_for_new(limit, max(row.prefix for row in batch), width):
        return False
    padded = [row.prefix for row in batch if row.prefix and row.start < width]
    return window is None or not padded or new <= room_for_new(window, max(padded), width)


def cut(generated: Sequence[int], asked: int, ends: Collection[int]) -> list[int]:
    """The tokens of one row: as many as it asked for, up to and with the token that ends it."""
    tokens = list(generated[:asked])
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


class OrderedWriter:
    """Writes one JSON object a line in the input's order, each as soon as all before it are written."""

    def __init__(self, file: BinaryIO, first: int) -> None:
        self.file = file
        self.next = first
        self._waiting: dict[int, dict[str, Any]] = {}

    def add(self, index: int, output: dict[str, Any]) -> None:
        """Take the output of one line, and write what the order allows."""
        self._waiting[index] = output
        while self.next in self._waiting:
            self.file.write(json_line(self._waiting.pop(self.next)) + b"\n")
            self.next += 1
        self.file.flush()
