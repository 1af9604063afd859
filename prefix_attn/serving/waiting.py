"""Waiting for several answers at once, and for clients that may hang up meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request

T = TypeVar("T")


async def gather_or_cancel(answers: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All of them; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(http: Request, answer: Awaitable[list[Any]]) -> list[Any] | None:
    """The answer, or None, and the answer cancelled, when the client hangs up."""
    wanted = asyncio.ensure_future(answer)
    disconnected = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((wanted, disconnected), return_when=asyncio.FIRST_COMPLETED)
        return await wanted if wanted.done() else None
    finally:
        for future in (wanted, disconnected):
            future.cancel()
        await asyncio.gather(wanted, disconnected, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
