"""The HTTP server: OpenAI's API, where the name of a model is the name of a task.

GET     /v1/models, /v1/models/NAME   the base model and every task
POST    /v1/completions               a prompt as it is
POST    /v1/chat/completions          messages, through the tokenizer's chat template
GET     /v1/prefixes                  tokens, bytes and source of every prefix
PUT     /v1/prefixes/NAME             add or replace one, from a file or folder of the server's: {"path": "..."};
                                      the answer has what makes it doubtful: {"warnings": [...], ...}
DELETE  /v1/prefixes/NAME             remove one
GET     /health, /metrics             whether the engine runs; numbers for Prometheus
"""

from __future__ import annotations

import asyncio
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.peft import other_base
from prefix_attn.bank.uses import BANK_LOCK
from prefix_attn.errors import PrefixAttnError, ShapeError, UnknownTask, UnsupportedModel
from prefix_attn.serving import protocol
from prefix_attn.serving.bodies import LimitedBodies
from prefix_attn.serving.engine import Engine, EngineFailed, Request
from prefix_attn.serving.metrics import Metrics
from prefix_attn.serving.prompts import prompt_tokens
from prefix_attn.serving.protocol import ChatCompletionRequest, CompletionRequest, ResponseBuilder
from prefix_attn.serving.refusals import add_error_handlers, error_body
from prefix_attn.serving.text import AnswerText, Detokenizer
from prefix_attn.serving.waiting import gather_or_cancel, unless_disconnected

#: Answers that one HTTP request may ask for.
MAX_CHOICES = 1024


class PutPrefixRequest(BaseModel):
    """``PUT /v1/prefixes/NAME``: a PEFT adapter or a prefix file, below the folder that the server was given."""

    model_config = ConfigDict(extra="forbid")

    path: str


def create_app(engine: Engine, tokenizer: Any, base: str, prefixes: Path | None = None) -> FastAPI:
    """The server, for uvicorn or another that runs ASGI applications, in one process.

    Args:
        engine: started; who starts it stops it.
        tokenizer: the model's.
        base: how the base model is called.
        prefixes: a folder from which prefixes may be added over HTTP; None refuses all changes.

    Raises:
        UnknownTask: a task of the bank is called like the base model.
    """
    if base in engine.bank:
        raise UnknownTask(f"base: expected a name that no task has, got {base!r}; give the base model another")
    server = _Server(engine, tokenizer, base, prefixes)
    app = FastAPI(title="prefix_attn", docs_url="/docs", redoc_url=None)
    app.add_middleware(LimitedBodies, limit=server.limit)
    add_error_handlers(app)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model(name) for name in (base, *engine.bank.names)]}

    @app.get("/v1/models/{name:path}")
    def one_model(name: str) -> dict[str, Any]:
        return server.model(server.task(name).name or base)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HTTPRequest) -> Response:
        task = server.task(body.model)
        check_count(len(body.prompts), body.n)
        return await server.answer(body, http, task, await server.in_thread(server.tokens, body, task))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: HTTPRequest) -> Response:
        task = server.task(body.model)
        return await server.answer(body, http, task, await server.in_thread(server.chat_tokens, body, task))

    @app.get("/v1/prefixes")
    def listed() -> list[dict[str, Any]]:
        with BANK_LOCK:
            return [server.described(name) for name in engine.bank.names]

    @app.put("/v1/prefixes/{name}")
    def put(name: str, body: PutPrefixRequest) -> dict[str, Any]:
        path = below(server.changes_from(), body.path)
        if name == base:
            raise UnsupportedModel(f"name: {name!r} is the base model; choose another")
        try:
            engine.bank.load(name, path, replace=True)
        except OSError as error:
            raise UnsupportedModel(f"path: cannot read {body.path!r}: {error.strerror or error}") from error
        # Found anew: Python tells warnings to a process, not to who asked.
        doubt = other_base(path, engine.bank.base)
        return server.described(name) | {"warnings": [] if doubt is None else [doubt]}

    @app.delete("/v1/prefixes/{name}", status_code=204)
    def delete(name: str) -> None:
        server.changes_from()
        engine.bank.remove(name)

    @app.get("/health")
    def health() -> JSONResponse:
        if engine.failure is not None:
            return JSONResponse(error_body(engine.failure, "server_error"), 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


class _Task:
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


class _Choice(NamedTuple):
    """One answer to be made."""

    task: _Task
    request: Request
    text: AnswerText


class _Server:
    """What the routes share."""

    def __init__(self, engine: Engine, tokenizer: Any, base: str, prefixes: Path | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.decode = Detokenizer(tokenizer)
        self.base = base
        self.prefixes = None if prefixes is None else prefixes.resolve()
        self.metrics = Metrics(engine, base)
        self.limit = min(engine.cache_tokens, engine.bank.context_limit or engine.cache_tokens)
        # of one thread, since two encodings must not overlap
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")

    async def in_thread(
        self, tokenize: Callable[[Any, _Task], list[list[int]]], body: Any, task: _Task
    ) -> list[list[int]]:
        """Tokens of all prompts, while the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, tokenize, body, task)

    def model(self, name: str) -> dict[str, Any]:
        """A task, or the base model, as an entry of OpenAI's list."""
        parent = None if name == self.base else self.base
        return {
            "id": name, "object": "model", "created": 0, "owned_by": "prefix_attn", "root": self.base, "parent": parent,
        }  # fmt: skip

    def task(self, name: str) -> _Task:
        """What a request's ``model`` names."""
        if self.base in self.engine.bank:
            raise UnknownTask(f"model: a task was added that is called like the base model, {self.base!r}; remove it")
        if name != self.base and name not in self.engine.bank:
            raise UnknownTask(f"model: expected one of {[self.base, *self.engine.bank.names]}, got {name!r}")
        return _Task(self.engine.bank, None if name == self.base else name)

    def tokens(self, body: CompletionRequest, task: _Task) -> list[list[int]]:
        """Of every prompt; behind a prefix that is a text, without another opening of the sequence."""
        made = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                prompt = prompt_tokens(self.tokenizer, prompt, self.limit, opens=not task.opens)
            made.append(prompt)
        return made

    def chat_tokens(self, body: ChatCompletionRequest, task: _Task) -> list[list[int]]:
        """Of a conversation, through the chat template."""
        if not self.tokenizer.chat_template:
            raise UnsupportedModel("messages: the model's tokenizer has no chat template; use /v1/completions")
        messages = [message.plain() for message in body.messages]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template's own refusal, of many types: of roles that do not take turns, say
            raise UnsupportedModel(f"messages: the chat template refuses them: {error}") from error
        return [prompt_tokens(self.tokenizer, text, self.limit, opens=not task.opens, special=False)]

    async def answer(
        self,
        body: CompletionRequest | ChatCompletionRequest,
        http: HTTPRequest,
        task: _Task,
        prompts: Sequence[list[int]],
    ) -> Response:
        """All choices of a request; as a stream if it wants one. What cannot be answered is refused before any is."""
        requests = [
            Request(tokens, task.id, body.new_tokens, body.sampling(self.engine.defaults)) for tokens in prompts
        ]
        for request in requests:
            self.engine.new_tokens(request)
        stops = body.stops, self.decode.stop_tokens(body.stops)
        choices = [_Choice(task, request, AnswerText(self.decode, request.tokens, *stops))
                   for request in requests for _ in range(body.n)]  # fmt: skip
        if self.engine.failure is not None:
            raise EngineFailed(self.engine.failure)
        response, prompt_tokens = ResponseBuilder(body, uuid.uuid4().hex), sum(map(len, prompts))
        self.metrics.prompt(task.name, prompt_tokens)
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

    async def _whole(self, choice: _Choice) -> tuple[str, str, int]:
        """Text, finish and number of tokens of one answer."""
        pieces = [piece async for piece in self._pieces(choice)]
        _, finish, tokens = pieces[-1]
        assert finish is not None, "an answer ends with its finish, or with an error"
        return "".join(more for more, _, _ in pieces), finish, tokens

    async def _pieces(self, choice: _Choice) -> AsyncIterator[tuple[str, str | None, int]]:
        """More text, the finish with the last, and the number of tokens until then."""
        task, request, text = choice
        watched, outcome = self.metrics.answer(task.name), "cancelled"
        pieces = self.engine.answer(request)
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
        self, choices: Sequence[_Choice], response: ResponseBuilder, prompt_tokens: int, with_usage: bool
    ) -> AsyncIterator[str]:
        """The stream: the choices' texts as they come."""
        events: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        counts = [0] * len(choices)

        async def follow(index: int, choice: _Choice) -> None:
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

    def described(self, name: str) -> dict[str, Any]:
        """A prefix of the bank; UnknownTask if it was removed meanwhile."""
        bank = self.engine.bank
        with BANK_LOCK:
            tokens, source = bank.prefix_len(name), bank.source(name)
            return {"name": name, "tokens": tokens, "bytes": bank.memory_usage.tasks[name], "source": source}

    def changes_from(self) -> Path:
        """The folder that changes may come from; UnsupportedModel where there is none."""
        if self.prefixes is None:
            raise UnsupportedModel("prefixes: this server was started without a folder that changes may come from")
        return self.prefixes


def check_count(prompts: int, n: int) -> None:
    """Raise `ShapeError` if one request asks for too many answers."""
    if prompts * n > MAX_CHOICES:
        raise ShapeError(
            f"prompt: expected at most {MAX_CHOICES} answers a request, got {prompts} prompts times n = {n}; send "
            "several requests"
        )


def below(folder: Path, path: str) -> Path:
    """A path below a folder, links followed; UnsupportedModel for any other."""
    try:
        found = (folder / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, no path, a loop of links
        raise UnsupportedModel(f"path: expected one below the server's folder of prefixes, but: {error}") from error
    if not found.is_relative_to(folder):
        raise UnsupportedModel(f"path: expected one below the server's folder of prefixes, got {path!r}")
    return found
