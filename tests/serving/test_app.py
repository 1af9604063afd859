"""The HTTP server: OpenAI's API, with a task for a model."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import prefix_attn as pa
from prefix_attn.cli.example import ANSWERS, INPUT
from prefix_attn.serving import Engine
from prefix_attn.serving.app import create_app
from prefix_attn.serving.protocol import CompletionRequest, ResponseBuilder
from tests.serving.conftest import EXAMPLE, Served
from tests.serving.engines import needs_engine, settled

pytestmark = needs_engine
PROMPT = f"{INPUT}>"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

#: A template that writes the example's prompts: BOS, what the user says, and the sign behind it.
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture
def client(served: Served, engine: Engine, tmp_path: Path) -> Iterator[TestClient]:
    shutil.copytree(EXAMPLE.folder / "adapters" / "upper", tmp_path / "new")
    with TestClient(create_app(engine, served.tokenizer, "base", tmp_path)) as client:
        yield client


def test_an_app_in_several_event_loops(served: Served, engine: Engine) -> None:
    """A client that is not entered makes a loop for each request."""
    client = TestClient(create_app(engine, served.tokenizer, "base"))
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: complete(client), range(12)))
    assert {text for answer in answers for text in texts(answer)} == {ANSWERS["upper"]}


def complete(client: TestClient, **asked: Any) -> dict[str, Any]:
    response = client.post(COMPLETIONS, json={"model": "upper", "prompt": PROMPT} | asked)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def texts(content: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in content["choices"]] == list(range(len(content["choices"])))
    return [choice["text"] for choice in content["choices"]]


def events(client: TestClient, path: str, **asked: Any) -> list[dict[str, Any]]:
    """The events of a stream, but for its end."""
    response = client.post(path, json={"model": "upper", "stream": True} | asked)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end, nothing = response.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def refusal(client: TestClient, path: str, **asked: Any) -> tuple[int, str, str | None]:
    response = client.post(path, json={"model": "upper"} | asked)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["message"], error["code"]


def test_models_are_the_base_and_the_tasks(client: TestClient) -> None:
    data = client.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in data] == [("base", None), *((task, "base") for task in ANSWERS)]


@pytest.mark.parametrize(("task", "answer"), ANSWERS.items())
def test_completions(client: TestClient, task: str, answer: str) -> None:
    content = complete(client, model=task)
    assert content["object"] == "text_completion"
    assert content["model"] == task
    assert content["choices"] == [{"index": 0, "text": answer, "logprobs": None, "finish_reason": "stop"}]
    assert content["usage"] == {
        "prompt_tokens": 9, "completion_tokens": len(answer) + 1, "total_tokens": 10 + len(answer),
    }  # fmt: skip


def test_the_base_model(client: TestClient, served: Served) -> None:
    assert texts(complete(client, model="base")) == [served.alone(PROMPT, None)]


def test_several_prompts_and_answers(client: TestClient, served: Served) -> None:
    tokens = served.tokenizer("abc>")["input_ids"]
    assert texts(complete(client, prompt=["abc>", "de>"])) == ["ABC", "DE"]
    assert texts(complete(client, prompt=["abc>", "de>"], n=2)) == ["ABC", "ABC", "DE", "DE"]
    assert texts(complete(client, prompt=tokens)) == ["ABC"]
    assert texts(complete(client, prompt=[tokens, [tokens[0], *tokens[2:]]])) == ["ABC", "BC"]


def test_an_empty_prompt_is_the_opening_of_the_sequence(client: TestClient, served: Served) -> None:
    content = complete(client, model="base", prompt="", max_tokens=3)
    assert content["usage"]["prompt_tokens"] == 1
    assert texts(content) == texts(complete(client, model="base", prompt=[""], max_tokens=3))


def test_lengths_and_stops(client: TestClient) -> None:
    cut = complete(client, max_tokens=3)
    assert (texts(cut), cut["choices"][0]["finish_reason"]) == (["HOT"], "length")
    stopped = complete(client, stop=["xyz", "T "])
    assert (texts(stopped), stopped["choices"][0]["finish_reason"]) == (["HO"], "stop")
    assert texts(complete(client, stop="TEA")) == ["HOT "]


def test_a_stop_string_that_is_a_special_token(client: TestClient, engine: Engine) -> None:
    """Also one that the model's config does not name as an end."""
    engine.ends = []
    stopped = complete(client, stop=["<eos>"], max_tokens=40)
    assert (texts(stopped), stopped["choices"][0]["finish_reason"]) == (["HOT TEA"], "stop")
    assert stopped["usage"]["completion_tokens"] == 8
    made = events(client, COMPLETIONS, prompt=PROMPT, stop="<eos>", max_tokens=40)
    assert "".join(event["choices"][0]["text"] for event in made) == "HOT TEA"


def test_a_temperature_samples(client: TestClient) -> None:
    assert len(set(texts(complete(client, temperature=2.0, n=16, max_tokens=30)))) > 1
    assert set(texts(complete(client, temperature=1.0, top_k=1, n=4))) == {"HOT TEA"}


def test_a_stream_is_the_whole_in_pieces(client: TestClient) -> None:
    made = events(client, COMPLETIONS, prompt=[PROMPT, "abc>"], stream_options={"include_usage": True})
    *made, usage = made
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 14, "completion_tokens": 12, "total_tokens": 26}
    of = [[event["choices"][0] for event in made if event["choices"][0]["index"] == i] for i in (0, 1)]
    assert ["".join(choice["text"] for choice in choices) for choices in of] == ["HOT TEA", "ABC"]
    for choices in of:
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len({event["id"] for event in made}) == 1


def test_chat(client: TestClient, served: Served) -> None:
    served.tokenizer.chat_template = TEMPLATE
    asked = {"messages": [{"role": "user", "content": [{"type": "text", "text": INPUT}]}]}
    content = client.post(CHAT, json={"model": "reverse", "max_completion_tokens": 20} | asked).json()
    assert content["object"] == "chat.completion"
    assert content["choices"] == [{
        "index": 0, "message": {"role": "assistant", "content": ANSWERS["reverse"]}, "logprobs": None,
        "finish_reason": "stop",
    }]  # fmt: skip
    made = events(client, CHAT, **asked)
    assert {event["object"] for event in made} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in made]
    assert deltas[0] == {"role": "assistant", "content": "H"}
    assert "".join(delta.get("content", "") for delta in deltas) == "HOT TEA"
    assert all("role" not in delta for delta in deltas[1:])
    assert made[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_chat_may_fill_the_context(client: TestClient, served: Served) -> None:
    served.tokenizer.chat_template = TEMPLATE
    asked = {"model": "base", "messages": [{"role": "user", "content": "a" * 60}]}
    content = client.post(CHAT, json=asked).json()
    assert content["usage"]["completion_tokens"] <= 64 - 62 + 1


def test_a_chat_behind_a_text_is_not_opened_again(client: TestClient, served: Served) -> None:
    """By a template that writes BOS, and by a tokenizer that adds it."""
    served.bank.add_text("sorting", served.tokenizer, "sort|", served.model)
    served.tokenizer.chat_template = TEMPLATE
    asked = {"messages": [{"role": "user", "content": INPUT}]}
    for task, tokens in (("sorting", 8), ("sort", 9)):
        content = client.post(CHAT, json={"model": task} | asked).json()
        assert content["choices"][0]["message"]["content"] == ANSWERS["sort"]
        assert content["usage"]["prompt_tokens"] == tokens
        for prompt in (PROMPT, f"<bos>{PROMPT}"):  # the latter as a template writes it
            content = complete(client, model=task, prompt=prompt)
            assert texts(content) == [ANSWERS["sort"]]
            assert content["usage"]["prompt_tokens"] == tokens


@pytest.mark.parametrize(
    ("asked", "status", "words", "code"),
    [
        ({"model": "uper"}, 404, "model: expected one of ['base', 'upper'", "model_not_found"),
        ({"max_tokens": 300}, 400, "ask for at most 50 new tokens", "context_length_exceeded"),
        ({"prompt": [5, "6"]}, 400, "prompt", None),
        ({"prompt": [True]}, 400, "prompt", None),
        ({"max_tokens": "2"}, 400, "max_tokens: Input should be a valid integer", None),
        ({"temperature": True}, 400, "temperature: Input should be a valid number", None),
        ({"top_k": 2**40}, 400, "top_k: expected an integer from 0", None),
        ({"prompt": []}, 400, "prompt", None),
        ({"prompt": [1, "a"]}, 400, "prompt", None),
        ({"prompt": [99_999]}, 400, "got 99999", None),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1", None),
        ({"temperature": -1}, 400, "temperature", None),
        ({"top_p": 0}, 400, "top_p", None),
        ({"stop": [""]}, 400, "stop", None),
        ({"n": 0}, 400, "n: ", None),
        ({"seed": 7, "temperature": 1.0}, 400, "seed is served with temperature 0 only", None),
        ({"logprobs": 5}, 400, "logprobs is not served", None),
        ({"logprobs": 0}, 400, "logprobs is not served", None),
        ({"best_of": True}, 400, "best_of is not served", None),
        ({"stop": ["x"] * 17}, 400, "stop", None),
        ({"stop": "<eos> "}, 400, "got '<eos> ', which holds '<eos>'; give that alone", None),
        ({f"field{i}": 1 for i in range(200)}, 400, "expected at most 100 fields", None),
        ({"prompt": "a" * 20_000}, 400, "20000 characters are too many", "context_length_exceeded"),
        ({"prompt": ["a"] * 300, "n": 4}, 400, "at most 1024 answers a request", None),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not served", None),
        ({"temprature": 0.5}, 400, "temprature: Extra inputs are not permitted", None),
    ],
)
def test_what_is_not_served_is_refused(
    client: TestClient, asked: dict[str, Any], status: int, words: str, code: str | None
) -> None:
    for stream in (False, True):
        got = refusal(client, COMPLETIONS, **{"prompt": PROMPT, "stream": stream} | asked)
        assert got[0] == status
        assert words in got[1]
        assert got[2] == code


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("parts", [1, 40])
def test_a_body_that_is_too_large(client: TestClient, path: str, parts: int) -> None:
    """Said by its client to be, or sent in parts without a word."""
    part = json.dumps({"model": "upper", "prompt": "a" * 2**21}).encode()
    content = part if parts == 1 else (part[: 2**16] for _ in range(parts))
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert "body: expected at most 1052672 bytes, got more" in response.json()["error"]["message"]


def test_the_error_of_a_long_body_is_short(client: TestClient) -> None:
    status, message, _ = refusal(client, COMPLETIONS, prompt=[1.5] * 50_000)
    assert status == 400
    assert len(message) < 2000


def test_what_changes_nothing_is_accepted(client: TestClient) -> None:
    neutral = {"seed": None, "logprobs": False, "presence_penalty": 0.0, "user": "someone", "best_of": 1}
    neutral |= dict.fromkeys(("n", "stop", "stream", "stream_options", "max_tokens", "temperature", "top_p", "tools"))
    assert texts(complete(client, **neutral)) == ["HOT TEA"]


def test_a_conversation_as_clients_send_it(client: TestClient, served: Served) -> None:
    """With the nulls of an answer before, and a developer, whom chat templates call the system."""
    served.tokenizer.chat_template = TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content if m.role != 'system' else '' }}"
    )
    nulls = dict.fromkeys(("refusal", "tool_calls", "function_call", "audio", "annotations", "name"))
    messages = [
        {"role": "developer", "content": "be brief"}, {"role": "user", "content": "hot"},
        {"role": "assistant", "content": " te"} | nulls, {"role": "user", "content": "a"},
    ]  # fmt: skip
    content = client.post(CHAT, json={"model": "upper", "messages": messages, "parallel_tool_calls": False}).json()
    assert content["choices"][0]["message"]["content"] == "HOT TEA"


def test_a_stop_string_in_what_comes_last(client: TestClient) -> None:
    """Whole only with the last token that the length allows."""
    stopped = complete(client, max_tokens=3, stop=["OT"])
    assert (texts(stopped), stopped["choices"][0]["finish_reason"]) == (["H"], "stop")
    held = complete(client, max_tokens=3, stop=["T T"])
    assert (texts(held), held["choices"][0]["finish_reason"]) == (["HOT"], "length")


def test_chats_that_cannot_be_had(client: TestClient, served: Served) -> None:
    hello = [{"role": "user", "content": "hello"}]
    assert "no chat template" in refusal(client, CHAT, messages=hello)[1]
    served.tokenizer.chat_template = "{{ raise_exception('users only') }}"
    assert "the chat template refuses them: users only" in refusal(client, CHAT, messages=hello)[1]
    served.tokenizer.chat_template = TEMPLATE
    assert "differ" in refusal(client, CHAT, messages=hello, max_tokens=3, max_completion_tokens=4)[1]
    assert "tools is not served" in refusal(client, CHAT, messages=hello, tools=[{"type": "function"}])[1]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert refusal(client, CHAT, messages=image)[0] == 400
    assert refusal(client, CHAT, messages=[])[0] == 400


def test_prefixes_change(client: TestClient, served: Served) -> None:
    assert [prefix["name"] for prefix in client.get("/v1/prefixes").json()] == list(ANSWERS)
    made = client.put("/v1/prefixes/reverse", json={"path": "new"}).json()
    assert made == {
        "name": "reverse",
        "tokens": 6,
        "bytes": served.bank.memory_usage.tasks["upper"],
        "source": "peft:new",
        "warnings": [],
    }
    assert texts(complete(client, model="reverse")) == ["HOT TEA"]
    assert client.put("/v1/prefixes/more", json={"path": "new"}).status_code == 200
    assert client.delete("/v1/prefixes/reverse").status_code == 204
    assert refusal(client, COMPLETIONS, model="reverse", prompt=PROMPT)[0] == 404
    assert served.bank.names == [*(task for task in ANSWERS if task != "reverse"), "more"]


@pytest.mark.filterwarnings("ignore:.*this adapter was trained on:UserWarning")
def test_a_prefix_of_another_base_model_is_doubted(client: TestClient, tmp_path: Path) -> None:
    config = tmp_path / "new" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "someone/other"}))
    for _ in range(2):  # every time
        made = client.put("/v1/prefixes/more", json={"path": "new"}).json()
        assert len(made["warnings"]) == 1
        assert "this adapter was trained on 'someone/other'" in made["warnings"][0]


def test_changes_that_are_refused(client: TestClient, served: Served) -> None:
    (names, put) = served.bank.names, client.put
    assert "does not exist" in put("/v1/prefixes/x", json={"path": "missing"}).json()["error"]["message"]
    assert "below the server's folder" in put("/v1/prefixes/x", json={"path": "../new"}).json()["error"]["message"]
    assert "below the server's folder" in put("/v1/prefixes/x", json={"path": "/etc"}).json()["error"]["message"]
    for path in ("a\0b", "x" * 5000, "\ud800"):
        response = put("/v1/prefixes/x", content=json.dumps({"path": path}))
        assert (response.status_code, "error" in response.json()) == (400, True)
    assert "is the base model" in put("/v1/prefixes/base", json={"path": "new"}).json()["error"]["message"]
    assert client.delete("/v1/prefixes/missing").status_code == 404
    assert served.bank.names == names


def test_a_prefix_that_another_client_removes_at_once(
    client: TestClient, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_and_lose(name: str, *args: Any, **options: Any) -> None:
        load(name, *args, **options)
        served.bank.remove(name)

    load = served.bank.load
    monkeypatch.setattr(served.bank, "load", load_and_lose)
    response = client.put("/v1/prefixes/more", json={"path": "new"})
    assert response.status_code == 409
    assert "removed by another client" in response.json()["error"]["message"]


def test_a_server_whose_prefixes_do_not_change(served: Served, engine: Engine) -> None:
    with TestClient(create_app(engine, served.tokenizer, "base")) as client:
        for response in (client.put("/v1/prefixes/x", json={"path": "x"}), client.delete("/v1/prefixes/upper")):
            assert response.status_code == 400
            assert "started without a folder" in response.json()["error"]["message"]
    assert "upper" in served.bank


def test_a_task_that_is_called_like_the_base_model(served: Served, engine: Engine) -> None:
    with pytest.raises(pa.UnknownTask, match="no task has, got 'upper'"):
        create_app(engine, served.tokenizer, "upper")


def test_a_task_that_is_called_like_the_base_model_later(client: TestClient, served: Served) -> None:
    served.bank.add("base", served.bank.key_values("upper"))
    for model in ("base", "upper"):
        status, message, _ = refusal(client, COMPLETIONS, model=model, prompt=PROMPT)
        assert (status, "'base'; remove it" in message) == (404, True)


def test_one_model(client: TestClient) -> None:
    upper = client.get("/v1/models/upper").json()
    assert (upper["id"], upper["object"], upper["root"], upper["parent"]) == ("upper", "model", "base", "base")
    assert client.get("/v1/models/base").json()["parent"] is None


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/v1/models/missing", None, 404), ("GET", "/v1/engines", None, 404), ("GET", COMPLETIONS, None, 405),
        ("POST", COMPLETIONS, "{", 400), ("POST", COMPLETIONS, "[" * 20_000, 400), ("POST", COMPLETIONS, "[]", 400),
        ("POST", COMPLETIONS, '{"\\ud800": 1}', 400), ("POST", COMPLETIONS, '{"model": "\\ud800", "prompt": "a"}', 404),
        ("POST", COMPLETIONS, '{"model": "upper", "prompt": "\\ud800"}', 400),
    ],
)  # fmt: skip
def test_every_error_has_the_form_of_openai(
    client: TestClient, method: str, path: str, content: str | None, status: int
) -> None:
    response = client.request(method, path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_metrics(client: TestClient) -> None:
    complete(client, prompt=[PROMPT, "abc>"], n=2)
    complete(client, model="base", prompt=f"sort|{PROMPT}", max_tokens=4)
    refusal(client, COMPLETIONS, prompt=PROMPT, max_tokens=300)
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'prefix_attn_requests_total{outcome="stop",task="upper"} 4.0',
        'prefix_attn_requests_total{outcome="length",task="base"} 1.0',
        'prefix_attn_prompt_tokens_total{task="upper"} 14.0',
        'prefix_attn_new_tokens_total{task="upper"} 24.0',
        "prefix_attn_first_token_seconds_count 5.0",
        "prefix_attn_next_token_seconds_count 5.0",
        "prefix_attn_running 0.0",
        "prefix_attn_waiting 0.0",
        'prefix_attn_prefix_bytes{task="upper"} 12288.0',
    ):
        assert line in lines


def test_an_engine_that_failed(client: TestClient, served: Served, engine: Engine) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    pa.unpatch(served.model)
    status, message, _ = refusal(client, COMPLETIONS, prompt=PROMPT)
    assert (status, "unpatched" in message) == (503, True)
    asyncio.run(settled(lambda: engine.failure is not None))
    assert client.get("/health").status_code == 503
    assert refusal(client, COMPLETIONS, prompt=PROMPT, stream=True)[0] == 503


def test_a_bug_has_the_form_of_openai_too(served: Served, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "new_tokens", lambda *_: 1 // 0)
    app = create_app(engine, served.tokenizer, "org/base")
    with TestClient(app, raise_server_exceptions=False) as client:
        assert refusal(client, COMPLETIONS, prompt=PROMPT)[:2] == (500, "internal error: ZeroDivisionError")
        assert client.get("/v1/models/org/base").json()["id"] == "org/base"


def test_an_engine_that_was_stopped(client: TestClient, engine: Engine) -> None:
    engine.stop()
    assert client.get("/health").status_code == 503
    assert "prefix_attn_running 0.0" in client.get("/metrics").text.splitlines()
    engine.start()
    assert texts(complete(client)) == ["HOT TEA"]


def test_an_engine_that_fails_in_a_stream(client: TestClient, served: Served) -> None:
    pa.unpatch(served.model)
    response = client.post(COMPLETIONS, json={"model": "upper", "prompt": PROMPT, "stream": True})
    last = response.text.strip().split("\n\n")[-1]
    assert "unpatched" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_an_event_is_one_line_however_lines_are_told_apart() -> None:
    """httpx ends lines at U+2028 too."""
    event = ResponseBuilder(CompletionRequest(model="m", prompt="x"), "id").event(0, "a\u2028b\x85c", None, False)
    line, *rest = event.splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: "))["choices"][0]["text"] == "a\u2028b\x85c"
