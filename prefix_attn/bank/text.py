"""A prompt as a prefix: the keys and values that the model itself computes for a text at positions 0..m-1.

A request that follows then gets, up to rounding, the result of prepending the text's tokens to its own. (Of prepending
the text itself, unless the tokenizer would join the two otherwise, or puts a space in front of every text.)
"""

from __future__ import annotations

from typing import Any

import torch

from prefix_attn.bank.base import Base
from prefix_attn.bank.forward import cached_kv, unwrap
from prefix_attn.bank.geometry import LayerKV
from prefix_attn.bank.tokens import tokenised
from prefix_attn.errors import IncompatiblePrefix

#: What a token may stand for that the model puts in its place.
MEDIA = ("image", "video", "audio")


def text_kv(tokenizer: Any, text: str, model: Any, base: Base, add_special_tokens: bool) -> list[LayerKV]:
    """Tokenise ``text`` and run the model on it.

    Returns:
        Per layer k and v, each ``[kv_heads, m, head_dim]``.

    Raises:
        IncompatiblePrefix: the text is no string, has no token, or one that stands for something else than text.
        ContextOverflow: its tokens leave no position for a request.
    """
    if not isinstance(text, str) or not text:
        raise IncompatiblePrefix(f"text: expected a non-empty string, got {text!r}")
    tokens = [int(token) for token in tokenised(tokenizer, text, special=add_special_tokens)]
    if not tokens:
        raise IncompatiblePrefix(f"text: expected at least one token, but the tokenizer makes none of {text!r}")
    config = unwrap(model).config
    placeholders = [getattr(config, f"{kind}_token_{name}", None) for kind in MEDIA for name in ("id", "index")]
    if found := [token for token in tokens if token in placeholders]:
        raise IncompatiblePrefix(
            f"text: expected text alone, got the token {found[0]}, which stands for an image, a video or a sound"
        )
    base.check_context(len(tokens), "text")
    return cached_kv(unwrap(model), torch.tensor([tokens], dtype=torch.int64))
