"""A text as tokens, opened by one BOS at most: the tokenizer adds it, or the text brings it along.

Chat templates write BOS; a tokenizer that adds its own in front of what a template wrote would make two.
"""

from __future__ import annotations

from typing import Any


def tokenised(tokenizer: Any, text: str, opens: bool = True, special: bool = True, **options: Any) -> list[int]:
    """Token ids of a text.

    Args:
        tokenizer: called as ``tokenizer(text, add_special_tokens=..., **options)["input_ids"]``.
        text: special tokens are added to it unless it begins with the tokenizer's BOS: then it has those it needs.
        opens: False for a text behind a prefix that has opened the sequence: none are added, and a BOS is left out.
        special: False adds none; for what is known to come from a chat template.
    """
    bos: str = getattr(tokenizer, "bos_token", None) or ""
    written = bool(bos) and text.startswith(bos)
    tokens = list(tokenizer(text, add_special_tokens=opens and special and not written, **options)["input_ids"])
    return tokens[1:] if not opens and tokens[:1] == [tokenizer.bos_token_id] else tokens
