"""A limit on the bytes of a request: a body is parsed at once, and everybody waits meanwhile."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

#: Bytes that a body may have for each position of the model; a token id takes less than 10.
BYTES_PER_POSITION = 64

#: Bytes that a body may have besides, whatever the model.
BYTES_BESIDES = 2**20


class LimitedBodies:
    """ASGI middleware that answers 413 to bodies too large for a model of ``limit`` positions."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app = app
        self.max_bytes = BYTES_BESIDES + BYTES_PER_POSITION * limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        taken = 0

        async def limited() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_bytes:
                while message.get("more_body"):  # to its end, since clients listen only then
                    message = await receive()
                raise HTTPException(
                    413,
                    f"body: expected at most {self.max_bytes} bytes, got more; send several requests, or shorter ones",
                )
            return message

        await self.app(scope, limited, send)
