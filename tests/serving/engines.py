"""Which transformers has the engine, and waiting for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import transformers

OLD = tuple(int(x) for x in transformers.__version__.split(".")[:2]) < (5, 23)
needs_engine = pytest.mark.skipif(OLD, reason="continuous batching is refused before transformers 5.23")


async def settled(done: Callable[[], bool]) -> None:
    """Wait until the engine's thread has come to it."""
    for _ in range(200):
        if done():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the engine did not settle")
