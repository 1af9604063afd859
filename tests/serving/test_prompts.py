"""Prompts as tokens: what fits is never refused, and what does not is soon known."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_attn import ContextOverflow
from prefix_attn.serving.prompts import LONGEST_TOKEN, prompt_tokens

LIMIT = 50


class Chunks:
    """A token for so many characters, and for what is left, in front of which stands the one that opens a text."""

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
        self.seen += len(text)
        return {"input_ids": [0, *(1 for _ in range(0, len(text), self.size))]}


@given(st.integers(1, LONGEST_TOKEN), st.integers(0, LONGEST_TOKEN * LIMIT))
def test_what_fits_is_never_refused(size: int, length: int) -> None:
    tokens = 1 + -(-length // size)
    try:
        assert len(prompt_tokens(Chunks(size), "a" * length, LIMIT)) == tokens
    except ContextOverflow:
        assert tokens > LIMIT


def test_of_what_is_too_long_only_the_beginning_is_looked_at() -> None:
    tokenizer = Chunks(1)
    limit = 10_000
    with pytest.raises(ContextOverflow, match=f"too many for the {limit} that can be held"):
        prompt_tokens(tokenizer, "a" * LONGEST_TOKEN * limit, limit)
    assert tokenizer.seen < 10 * limit
    with pytest.raises(ContextOverflow, match="2560001 characters are too many"):
        prompt_tokens(tokenizer, "a" * (LONGEST_TOKEN * limit + 1), limit)
    assert tokenizer.seen < 10 * limit
