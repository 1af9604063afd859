"""The part of OpenAI's HTTP API that is served: what a request may hold, and what is sent back.

A field that would change the answer and is not served is refused unless it has the value that changes nothing.

Source: the OpenAPI description of the OpenAI API, completions and chat completions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from prefix_attn.errors import ShapeError
from prefix_attn.serving.sampling import Sampling

#: Fields that are not served, with the values that ask for nothing; null is one for every field.
UNSERVED_FIELDS: Mapping[str, Any] = {
    "best_of": 1, "echo": False, "suffix": "", "logit_bias": {}, "presence_penalty": 0,
    "frequency_penalty": 0, "top_logprobs": None, "tools": [], "tool_choice": "none",
    "response_format": {"type": "text"}, "logprobs": False, "service_tier": "auto", "modalities": ["text"],
}  # fmt: skip

#: Fields that are accepted because they cannot change an answer.
IGNORED = (
    "user", "metadata", "store", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
)  # fmt: skip

#: More fields than there are.
MAX_FIELDS = 100


def _without_nulls(given: Any) -> Any:
    """A JSON object but for its nulls, which ask for the default."""
    return {name: x for name, x in given.items() if x is not None} if isinstance(given, dict) else given


def _real(text: str) -> str:
    """Of real characters: half a surrogate pair cannot be tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected real characters, got half a surrogate pair at {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(_real)]
T = TypeVar("T")
Several = Annotated[list[T], Field(min_length=1, fail_fast=True)]  # of a long list, one error is enough
Stop = Annotated[Text, Field(min_length=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class APIRequest(BaseModel):
    """What both kinds of requests have in common.

    ``model`` is the name of a task, or of the base model for no prefix. ``top_k`` (0 keeps all tokens) is our own.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = _without_nulls(given)
        if len(given) > MAX_FIELDS:
            raise ValueError(f"expected at most {MAX_FIELDS} fields, got {len(given)}")
        for name, neutral in UNSERVED_FIELDS.items():
            value = given.get(name)
            if value is not None and (value != neutral or isinstance(value, bool) != isinstance(neutral, bool)):
                raise ValueError(f"{name} is not served; leave it out")
        return {name: x for name, x in given.items() if name not in UNSERVED_FIELDS and name not in IGNORED}

    def sampling(self, defaults: Sampling) -> Sampling:
        """How tokens are chosen; what the request leaves open is as the model's own config has it."""
        sampling = defaults.but(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        if self.seed is not None and sampling.temperature:
            raise ShapeError("seed is served with temperature 0 only, where it changes nothing; leave one of them out")
        return sampling

    @property
    def stops(self) -> list[str]:
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(APIRequest):
    """``POST /v1/completions``: a text, or its tokens, or a list of either."""

    prompt: Text | Several[int] | Several[Text] | Several[Several[int]]
    max_tokens: int = Field(16, ge=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        numbers = [x for x in self.prompt if isinstance(x, int)]
        return [numbers] if numbers else [x for x in self.prompt if not isinstance(x, int)]

    @property
    def new_tokens(self) -> int:
        return self.max_tokens


class Part(BaseModel):
    """A part of a message, of which only text is served."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, given: Any) -> Any:
        return _without_nulls(given)

    def plain(self) -> dict[str, str]:
        """As chat templates want it; they call a developer the system."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletionRequest(APIRequest):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_maximum(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ResponseBuilder:
    """What is sent back for one HTTP request: whole, or as events of a stream."""

    def __init__(self, body: CompletionRequest | ChatCompletionRequest, request_id: str) -> None:
        self._chat = isinstance(body, ChatCompletionRequest)
        kind = "chat.completion" if self._chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{request_id}", "created": int(time.time()),
            "model": body.model,
        }  # fmt: skip
        self._kind, self._chunk = kind, f"{kind}.chunk" if self._chat else kind

    def whole(self, choices: list[tuple[str, str]], usage: dict[str, int]) -> dict[str, Any]:
        """The response, of the text and the finish of every choice."""
        made = []
        for index, (text, finish) in enumerate(choices):
            content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            made.append({"index": index, **content, "logprobs": None, "finish_reason": finish})
        return {**self._head, "object": self._kind, "choices": made, "usage": usage}

    def event(self, index: int, text: str, finish: str | None, first: bool) -> str:
        """One event of a stream: more text of a choice."""
        if self._chat:
            role = {"role": "assistant"} if first else {}
            content: dict[str, Any] = {"delta": {**role, **({"content": text} if text or first else {})}}
        else:
            content = {"text": text}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish}
        return event({**self._head, "object": self._chunk, "choices": [choice]})

    def usage_event(self, usage: dict[str, int]) -> str:
        """The event that ends a stream whose request asked for it."""
        return event({**self._head, "object": self._chunk, "choices": [], "usage": usage})


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Tokens of the prompts and the answers; those of prefixes are in neither."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": prompt_tokens + new_tokens,
    }  # fmt: skip


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


END_OF_STREAM = "data: [DONE]\n\n"
