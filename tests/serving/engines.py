"""Which transformers has the engine, its answers, and waiting for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import transformers

if TYPE_CHECKING:  # older transformers have none
    from prefix_attn.serving import Engine, Request

OLD = tuple(int(x) for x in transformers.__version__.split(".")[:2]) < (5, 23)
needs_engine = pytest.mark.skipif(OLD, reason="continuous batching is refused before transformers 5.23")


async def settled(done: Callable[[], bool]) -> None:
    """Wait until the engine's thread has come to it."""
    for _ in range(200):
        if done():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the engine did not settle")


async def answer(engine: Engine, request: Request) -> tuple[list[int], str]:
    tokens: list[int] = []
    async for piece in engine.answer(request):
        assert piece.tokens or piece.finish
        tokens += piece.tokens
        finish = piece.finish
    assert finish is not None
    return tokens, finish


def answers(engine: Engine, *requests: Request) -> list[tuple[list[int], str]]:
    async def together() -> list[tuple[list[int], str]]:
        return await asyncio.gather(*(answer(engine, request) for request in requests))

    return asyncio.run(together())
