"""Parsing, batches, order and resumption, without a model."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_attn.cli.requests import (
    Done,
    Line,
    OrderedWriter,
    Row,
    cut,
    cut_into_batches,
    finished,
    json_line,
    parse_line,
    read_lines,
)
from prefix_attn.errors import PrefixAttnError


def encoded(**request: Any) -> bytes:
    return json.dumps(request).encode()


def test_a_full_line() -> None:
    line = parse_line(7, encoded(task="sum", prompt="a b", max_new_tokens=3, id="ignored"), 32)
    assert line == Line(7, "sum", "a b", 3)


@pytest.mark.parametrize("request_", [{"prompt": "x"}, {"prompt": "x", "task": None, "max_new_tokens": None}])
def test_task_and_length_are_optional(request_: dict[str, Any]) -> None:
    assert parse_line(1, encoded(**request_), 32) == Line(1, None, "x", 32)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{", "got what is no JSON at column 2"),
        (b'"text"', "expected a JSON object, got str"),
        (b'{"prompt": "\xff"}', "byte 13 of the line is none"),
        (b"[" * 100_000, "expected a JSON object, but: maximum recursion"),
        (b"1" * 5_000, "expected a JSON object, but: Exceeds the limit"),
        (b"{}", "prompt: missing"),
        (b'{"prompt": null}', "prompt: expected text, got null"),
        (b'{"prompt": 3}', "prompt: expected text, got 3"),
        (b'{"prompt": "\\ud800"}', "prompt: expected text, got"),
        (b'{"prompt": "x", "task": 1}', "task: expected the name of a task"),
        (b'{"prompt": "x", "task": ["a"]}', "task: expected the name of a task"),
        (b'{"prompt": "x", "max_new_tokens": 0}', "max_new_tokens: expected an integer of at least 1, got 0"),
        (b'{"prompt": "x", "max_new_tokens": 1.5}', "max_new_tokens: expected an integer"),
        (b'{"prompt": "x", "max_new_tokens": true}', "max_new_tokens: expected an integer"),
        (b'{"prompt": "x", "max_new_tokens": "5"}', "max_new_tokens: expected an integer"),
    ],
)
def test_bad_lines_say_why_and_can_be_written(raw: bytes, says: str) -> None:
    line = parse_line(1, raw, 32)
    assert line.error is not None
    assert says in line.error
    assert json.loads(json_line(line.output(error=line.error)))["error"] == line.error


def test_line_numbers_are_those_of_the_file() -> None:
    lines = read_lines(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b\\u2028"}\n{"prompt": "c\xe2\x80\xa8"}', 32)
    assert [(line.number, line.prompt) for line in lines] == [(1, "a"), (4, "b\u2028"), (5, "c\u2028")]
    assert read_lines(b"", 32) == []


LINES = [Line(1, "a", "x", 8), Line(3, None, "ü\n", 8), Line(4, error="bad")]
OUTPUT = [
    json_line(LINES[0].output(text="y", new_tokens=1)) + b"\n",
    json_line(LINES[1].output(text="", new_tokens=2)) + b"\n",
    json_line(LINES[2].output(error="bad")) + b"\n",
]


@pytest.mark.parametrize("complete", range(4))
def test_every_torn_output_is_continued_after_its_last_complete_line(complete: int) -> None:
    kept = b"".join(OUTPUT[:complete])
    expected = Done(complete, len(kept), failed=int(complete == 3))
    torn = OUTPUT[complete][:-1] if complete < 3 else b""
    for size in range(len(torn) + 1):
        assert finished(kept + torn[:size], LINES) == expected


@pytest.mark.parametrize(
    ("existing", "says"),
    [
        (OUTPUT[1], "line 1 of the existing file does not belong"),
        (OUTPUT[0] + OUTPUT[2], "line 2 of"),
        (OUTPUT[0].replace(b'"x"', b'"z"'), "line 1 of"),
        (OUTPUT[0].replace(b'"a"', b"null"), "line 1 of"),
        (OUTPUT[0].replace(b": 8", b": 9"), "line 1 of .* does not belong to this input and --max-new-tokens"),
        (OUTPUT[0][:-2] + b"\0\n", "line 1 of"),
        (b"\n", "line 1 of"),
        (b"notes without an end of line", "line 1 of"),
        (b"".join([*OUTPUT, OUTPUT[0]]), "more lines than the 3 requests"),
        (b"".join(OUTPUT) + b"{", "more lines than the 3 requests"),
    ],
)
def test_an_output_of_another_input_is_refused(existing: bytes, says: str) -> None:
    with pytest.raises(PrefixAttnError, match=says):
        finished(existing, LINES)


rows = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 8), st.integers(1, 20)), max_size=30)


@given(rows, st.integers(1, 5))
def test_batches_hold_every_row_once_and_none_past_the_context(
    sizes: list[tuple[int, int, int]], batch_size: int
) -> None:
    limit = 47  # one row alone needs at most 20 + 8 + 20 - 1
    made = [Row(i, None, [0] * n, m, new) for i, (n, m, new) in enumerate(sizes)]
    batches = cut_into_batches(made, batch_size, limit)
    assert sorted(row.index for batch in batches for row in batch) == list(range(len(made)))
    for batch in batches:
        width, new = max(len(row.tokens) for row in batch), max(row.new_tokens for row in batch)
        assert 1 <= len(batch) <= batch_size
        assert all(row.prefix + width + new - 1 <= limit for row in batch)


def test_padding_takes_no_room_in_a_sliding_window() -> None:
    """A prefix of 4, prompts of 2 and 6, 3 new tokens: the short row needs 4 + 6 + 2 slots of the window beside it."""
    made = [Row(0, "a", [0] * 2, 4, 3), Row(1, None, [0] * 6, 0, 3)]
    assert cut_into_batches(made, 2, window=12) == [made]
    assert cut_into_batches(made, 2, window=11) == [made[:1], made[1:]]
    alike = [Row(0, "a", [0] * 6, 4, 3), Row(1, "a", [0] * 6, 4, 3)]
    assert cut_into_batches(alike, 2, window=8) == [alike], "none is padded"


def test_an_encoders_prompts_take_no_positions_of_the_decoder() -> None:
    """20 positions: a start token, a prefix of 8 and 12 new tokens, the last of which needs none."""
    made = [Row(i, None, [0] * 50, 8, 12, encoded=True) for i in range(4)]
    assert cut_into_batches(made, 4, limit=20) == [made]
    assert len(cut_into_batches(made, 4, limit=19)) == 4


def test_rows_of_like_work_share_a_batch() -> None:
    made = [Row(i, None, [0] * n, 0, new) for i, (n, new) in enumerate([(9, 4), (1, 4), (5, 50), (2, 4)])]
    assert [[row.index for row in batch] for batch in cut_into_batches(made, 2)] == [[1, 3], [0, 2]]


@pytest.mark.parametrize(("asked", "kept"), [(9, [5, 6, 2]), (3, [5, 6, 2]), (2, [5, 6]), (1, [5])])
def test_an_answer_is_cut_at_its_end_or_at_what_was_asked(asked: int, kept: list[int]) -> None:
    assert cut([5, 6, 2, 0, 0], asked, {2}) == kept


def test_without_an_end_all_is_kept() -> None:
    assert cut([5, 6], 4, set()) == [5, 6]


@given(st.permutations(range(8)))
def test_outputs_are_written_in_order_as_soon_as_it_allows(order: list[int]) -> None:
    file = io.BytesIO()
    writer = OrderedWriter(file, first=0)
    arrived: set[int] = set()
    for index in order:
        writer.add(index, {"line": index})
        arrived.add(index)
        ready = next(i for i in range(9) if i not in arrived)
        assert file.getvalue() == b"".join(b'{"line": %d}\n' % i for i in range(ready))
        assert writer.next == ready
