"""How many tokens fit behind a prefix into the positions that a model has."""

from __future__ import annotations


def room_for_new(limit: int, prefix: int, tokens: int) -> int:
    """New tokens that fit behind a prefix and a prompt of ``tokens``; less than 1 where none does.

    The last new token is never fed back, so it needs no position. (Hence also: how long a prompt may be that is to be
    followed by ``tokens`` new ones.)
    """
    return limit - prefix - tokens + 1
