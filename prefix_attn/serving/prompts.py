"""A prompt as tokens; a text that is too long is tokenised only as far as shows it, since others wait meanwhile."""

from __future__ import annotations

from typing import Any

from prefix_attn.bank.tokens import tokenised
from prefix_attn.errors import ContextOverflow

#: No text has more characters a token in the mean: longer prompts are refused before they are tokenised.
LONGEST_TOKEN = 256


def prompt_tokens(tokenizer: Any, text: str, limit: int, **options: bool) -> list[int]:
    """`tokenised`, for a model of ``limit`` positions.

    The beginning of a text has the tokens of the whole text but for its last few. So a beginning with more than twice
    as many tokens as the model has positions shows that the text is too long (the 4 * LONGEST_TOKEN allow for a last
    word that is one token in the whole text, and one per byte here). If it has fewer, a beginning twice as long is
    tried, until it is the whole text.

    Raises:
        ContextOverflow: the text is too long, whatever prefix and new tokens are wanted; one that fits never is.
    """
    if len(text) > LONGEST_TOKEN * limit:
        raise ContextOverflow(f"prompt: {len(text)} characters are too many for the {limit} tokens that can be held")
    most = 2 * limit + 4 * LONGEST_TOKEN
    beginning = 4 * most
    while beginning < len(text):
        if len(tokenised(tokenizer, text[:beginning], verbose=False, **options)) > most:
            raise ContextOverflow(
                f"prompt: of {len(text)} characters, the first {beginning} are more than {most} tokens, too many for "
                f"the {limit} that can be held"
            )
        beginning *= 2
    return tokenised(tokenizer, text, verbose=False, **options)
