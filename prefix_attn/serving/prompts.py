"""A prompt as tokens; of a text that is too long, no more are made than show it, since others wait meanwhile."""

from __future__ import annotations

from typing import Any

from prefix_attn.bank.tokens import tokenised
from prefix_attn.errors import ContextOverflow

#: No text has more characters a token in the mean: longer prompts are refused before they are tokenised.
LONGEST_TOKEN = 256


def prompt_tokens(tokenizer: Any, text: str, limit: int, **options: bool) -> list[int]:
    """`tokenised`, for a model of ``limit`` positions.

    A text and its beginning have the same tokens there, but for the last few: a beginning with more than twice as many
    as the model has positions (and some, for a tokenizer that makes one token of the last word, or one a byte) shows
    that the whole is too long. Of others the double is looked at, until it is the whole.

    Raises:
        ContextOverflow: the text is too long, whatever prefix and new tokens are wanted; one that fits never is.
    """
    if len(text) > LONGEST_TOKEN * limit:
        raise ContextOverflow(f"prompt: {len(text)} characters are too many for the model's {limit} positions")
    most = 2 * limit + 4 * LONGEST_TOKEN
    beginning = 4 * most
    while beginning < len(text):
        if len(tokenised(tokenizer, text[:beginning], verbose=False, **options)) > most:
            raise ContextOverflow(
                f"prompt: of {len(text)} characters, the first {beginning} are more than {most} tokens, too many for "
                f"the model's {limit} positions"
            )
        beginning *= 2
    return tokenised(tokenizer, text, verbose=False, **options)
