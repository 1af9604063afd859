"""Errors as clients of OpenAI's API expect them: a status, and ``{"error": {"message": ...}}``."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from prefix_attn.errors import ContextOverflow, PrefixAttnError, UnknownTask
from prefix_attn.serving.engine import EngineFailed

#: Errors that are listed of one body.
MAX_ERRORS = 8


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of an application in OpenAI's form."""
    app.add_exception_handler(PrefixAttnError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _not_served)
    app.add_exception_handler(Exception, _unexpected)


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    message = message.encode(errors="backslashreplace").decode()  # what was sent may be in it, whatever that is
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _refused(_: Request, refusal: Exception) -> JSONResponse:
    """What the package refuses, with the status that clients of OpenAI's API expect."""
    message = str(refusal)
    if isinstance(refusal, EngineFailed):
        return JSONResponse(error_body(message, "server_error"), 503)
    if isinstance(refusal, UnknownTask):
        return JSONResponse(error_body(message, "invalid_request_error", "model_not_found"), 404)
    code = "context_length_exceeded" if isinstance(refusal, ContextOverflow) else None
    return JSONResponse(error_body(message, "invalid_request_error", code), 400)


def _not_served(_: Request, problem: Exception) -> JSONResponse:
    """Paths and methods that there are not, and bodies that are no JSON."""
    assert isinstance(problem, HTTPException)
    return JSONResponse(error_body(str(problem.detail), "invalid_request_error"), problem.status_code)


def _malformed(_: Request, problem: Exception) -> JSONResponse:
    """What is no request: missing, unknown and wrong fields."""
    assert isinstance(problem, RequestValidationError)
    lines = []
    for part in problem.errors()[:MAX_ERRORS]:
        place, text = ".".join(map(str, part["loc"][1:])), part["msg"].removeprefix("Value error, ")
        if not place and "dictionary" in text:
            text = "expected a JSON object, sent with content-type: application/json"
        lines.append(f"{place}: {text}".removeprefix(": "))
    return JSONResponse(error_body("; ".join(lines), "invalid_request_error"), 400)


def _unexpected(_: Request, problem: Exception) -> JSONResponse:
    """A bug; the server's log has the traceback."""
    return JSONResponse(error_body(f"internal error: {type(problem).__name__}", "server_error"), 500)
