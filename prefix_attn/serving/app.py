"""The HTTP server: OpenAI's API, where the name of a model is the name of a task.

GET     /v1/models, /v1/models/NAME   the base model and every task
POST    /v1/completions               a prompt as it is
POST    /v1/chat/completions          messages, through the tokenizer's chat template
GET     /v1/prefixes                  tokens, bytes and source of every prefix
PUT     /v1/prefixes/NAME             add or replace one from a path on the server: {"path": "..."};
                                      the response lists warnings about it: {"warnings": [...], ...}
DELETE  /v1/prefixes/NAME             remove one
GET     /health, /metrics             whether the engine runs; numbers for Prometheus
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict

from prefix_attn.bank.names import choices
from prefix_attn.bank.peft import other_base
from prefix_attn.bank.uses import BANK_LOCK
from prefix_attn.errors import ShapeError, UnknownTask, UnsupportedModel
from prefix_attn.serving.answers import HeldTask, Responder
from prefix_attn.serving.bodies import LimitedBodies
from prefix_attn.serving.engine import Engine
from prefix_attn.serving.metrics import Metrics
from prefix_attn.serving.prompts import prompt_tokens
from prefix_attn.serving.protocol import ChatCompletionRequest, CompletionRequest
from prefix_attn.serving.refusals import add_error_handlers, error_body
from prefix_attn.serving.text import Detokenizer

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
        prompts = await server.in_thread(server.tokens, body, task)
        return await server.responder.respond(body, http, task, prompts)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: HTTPRequest) -> Response:
        task = server.task(body.model)
        prompts = await server.in_thread(server.chat_tokens, body, task)
        return await server.responder.respond(body, http, task, prompts)

    @app.get("/v1/prefixes")
    def listed() -> list[dict[str, Any]]:
        with BANK_LOCK:
            size = engine.bank.memory_usage.tasks  # once: it adds up all of them
            return [server.described(name, size) for name in engine.bank.names]

    @app.put("/v1/prefixes/{name}")
    def put(name: str, body: PutPrefixRequest) -> dict[str, Any]:
        path = below(server.changes_from(), body.path)
        if name == base:
            raise UnsupportedModel(f"name: {name!r} is the base model; choose another")
        try:
            engine.bank.load(name, path, replace=True)
        except OSError as error:
            raise UnsupportedModel(f"path: cannot read {body.path!r}: {error.strerror or error}") from error
        # Checked a second time: `load` warns, but a warning reaches the server's log and not the client.
        doubt = other_base(path, engine.bank.base)
        try:
            return server.described(name) | {"warnings": [] if doubt is None else [doubt]}
        except UnknownTask as error:
            raise HTTPException(409, f"name: {name!r} was added, and then removed by another client") from error

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


class _Server:
    """What the routes share."""

    def __init__(self, engine: Engine, tokenizer: Any, base: str, prefixes: Path | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.base = base
        self.prefixes = None if prefixes is None else prefixes.resolve()
        self.metrics = Metrics(engine, base)
        self.responder = Responder(engine, Detokenizer(tokenizer), self.metrics)
        self.limit = min(engine.cache_tokens, engine.bank.context_limit or engine.cache_tokens)
        # One thread, since a tokenizer must not encode two texts at once.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")

    async def in_thread(
        self, tokenize: Callable[[Any, HeldTask], list[list[int]]], body: Any, task: HeldTask
    ) -> list[list[int]]:
        """Tokenise all prompts without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, tokenize, body, task)

    def model(self, name: str) -> dict[str, Any]:
        """A task, or the base model, as an entry of OpenAI's list."""
        parent = None if name == self.base else self.base
        return {
            "id": name, "object": "model", "created": 0, "owned_by": "prefix_attn", "root": self.base, "parent": parent,
        }  # fmt: skip

    def task(self, name: str) -> HeldTask:
        """The task that a request's ``model`` field names."""
        if self.base in self.engine.bank:
            raise UnknownTask(f"model: a task was added that is called like the base model, {self.base!r}; remove it")
        if name != self.base and name not in self.engine.bank:
            raise UnknownTask(f"model: expected one of {choices([self.base, *self.engine.bank.names])}, got {name!r}")
        return HeldTask(self.engine.bank, None if name == self.base else name)

    def tokens(self, body: CompletionRequest, task: HeldTask) -> list[list[int]]:
        """Token ids of every prompt; without BOS behind a prefix that is a text, which has opened the sequence."""
        made = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                prompt = prompt_tokens(self.tokenizer, prompt, self.limit, opens=not task.opens)
            made.append(prompt)
        return made

    def chat_tokens(self, body: ChatCompletionRequest, task: HeldTask) -> list[list[int]]:
        """Token ids of a conversation, laid out by the chat template."""
        messages = [message.plain() for message in body.messages]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise errors of many types, such as for roles that do not alternate
            if not self.tokenizer.chat_template:  # nor another way, as mistral-common's tokenizers have
                raise UnsupportedModel(
                    "messages: the model's tokenizer has no chat template; use /v1/completions"
                ) from error
            raise UnsupportedModel(f"messages: the chat template refuses them: {error}") from error
        return [prompt_tokens(self.tokenizer, text, self.limit, opens=not task.opens, special=False)]

    def described(self, name: str, size: Mapping[str, int] | None = None) -> dict[str, Any]:
        """A prefix of the bank, and the bytes that it has by ``size``; UnknownTask if it was removed meanwhile."""
        bank = self.engine.bank
        with BANK_LOCK:
            tokens, source = bank.prefix_len(name), bank.source(name)
            size = bank.memory_usage.tasks if size is None else size
            return {"name": name, "tokens": tokens, "bytes": size[name], "source": source}

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
