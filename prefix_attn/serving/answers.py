"""All answers to one HTTP request: refused as a whole before any is begun, then sent whole or as a stream."""

from __future__ import annotations

import asyncio
import uuid
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.uses import BANK_LOCK
from prefix_attn.errors import PrefixAttnError
from prefix_attn.serving import protocol
from prefix_attn.serving.engine import Engine, EngineFailed, Request
from prefix_attn.serving.metrics import Metrics
from prefix_attn.serving.protocol import ChatCompletionRequest, CompletionRequest, ResponseBuilder
from prefix_attn.serving.refusals import error_body
from prefix_attn.serving.text import AnswerText, Detokenizer
from prefix_attn.serving.waiting import gather_or_cancel, unless_disconnected


class HeldTask:
    """A task as one HTTP request found it, for its tokens and all of its answers: its prefix is held while this lives.

    Attributes:
        name: None for the base model.
        id: -1 for it.
        opens: the prefix is a text, which opens the sequence.
    """

    def __init__(self, bank: PrefixBank, name: str | None) -> None:
        self.name = name
        with BANK_LOCK:
            self.id = int(bank.task_ids([name]))
            self.opens = name is not None and bank.source(name) == "text"
            bank.hold([self.id])
        weakref.finalize(self, bank.release, [self.id])


class Choice(NamedTuple):
    """One answer to be made."""

    task: HeldTask
    request: Request
    text: AnswerText


class Responder:
    """Answers HTTP requests whose task and tokens are known."""

    def __init__(self, engine: Engine, decode: Detokenizer, metrics: Metrics) -> None:
        self._engine, self._decode, self._metrics = engine, decode, metrics

    async def respond(
        self,
        body: CompletionRequest | ChatCompletionRequest,
        http: HTTPRequest,
        task: HeldTask,
        prompts: Sequence[list[int]],
    ) -> Response:
        """All choices of a request; as a stream if it wants one. What cannot be answered is refused before any is."""
        requests = [
            Request(tokens, task.id, body.new_tokens, body.sampling(self._engine.defaults)) for tokens in prompts
        ]
        for request in requests:
            self._engine.new_tokens(request)
        stops = body.stops, self._decode.stop_tokens(body.stops)
        choices = [Choice(task, request, AnswerText(self._decode, request.tokens, *stops))
                   for request in requests for _ in range(body.n)]  # fmt: skip
        if self._engine.failure is not None:
            raise EngineFailed(self._engine.failure)
        response, prompt_tokens = ResponseBuilder(body, uuid.uuid4().hex), sum(map(len, prompts))
        self._metrics.prompt(task.name, prompt_tokens)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(
                self._events(choices, response, prompt_tokens, with_usage), media_type="text/event-stream"
            )
        whole = await unless_disconnected(http, gather_or_cancel([self._whole(choice) for choice in choices]))
        if whole is None:
            return Response(status_code=499)  # nobody reads it
        new_tokens = sum(tokens for _, _, tokens in whole)
        texts = [(text, finish) for text, finish, _ in whole]
        return JSONResponse(response.whole(texts, protocol.usage(prompt_tokens, new_tokens)))

    async def _whole(self, choice: Choice) -> tuple[str, str, int]:
        """Text, finish and number of tokens of one answer."""
        pieces = [piece async for piece in self._pieces(choice)]
        _, finish, tokens = pieces[-1]
        assert finish is not None, "an answer ends with its finish, or with an error"
        return "".join(more for more, _, _ in pieces), finish, tokens

    async def _pieces(self, choice: Choice) -> AsyncIterator[tuple[str, str | None, int]]:
        """More text, the finish with the last, and the number of tokens until then."""
        task, request, text = choice
        watched, outcome = self._metrics.answer(task.name), "cancelled"
        pieces = self._engine.answer(request)
        try:
            async for tokens, finish in pieces:
                watched.add(len(tokens))
                more = text.add(tokens)
                if finish is not None or text.stopped:
                    more += text.end()
                    outcome = "stop" if text.stopped else str(finish)
                    yield more, outcome, watched.tokens
                    return
                yield more, None, watched.tokens
        except PrefixAttnError:
            outcome = "error"
            raise
        finally:
            watched.end(outcome)
            await pieces.aclose()  # type: ignore[attr-defined]

    async def _events(
        self, choices: Sequence[Choice], response: ResponseBuilder, prompt_tokens: int, with_usage: bool
    ) -> AsyncIterator[str]:
        """The stream: the choices' texts as they come."""
        events: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        counts = [0] * len(choices)

        async def follow(index: int, choice: Choice) -> None:
            first = True
            try:
                async for more, finish, counts[index] in self._pieces(choice):
                    if more or finish or first:
                        events.put_nowait(response.event(index, more, finish, first))
                        first = False
            except Exception as error:  # whatever it is, the reader must hear of it
                events.put_nowait(error)
            events.put_nowait(None)

        tasks = [asyncio.create_task(follow(index, choice)) for index, choice in enumerate(choices)]
        try:
            left = len(tasks)
            while left:
                event = await events.get()
                if isinstance(event, Exception):
                    yield protocol.event(error_body(str(event), "server_error"))
                    return
                left -= event is None
                if event is not None:
                    yield event
            if with_usage:
                yield response.usage_event(protocol.usage(prompt_tokens, sum(counts)))
            yield protocol.END_OF_STREAM
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
