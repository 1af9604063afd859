"""A real server and many clients: answers under load, while prefixes change, and clients that hang up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from prefix_attn.cli.example import ANSWERS, INPUT
from prefix_attn.serving import Engine
from prefix_attn.serving.app import create_app
from tests.serving.conftest import EXAMPLE, Served
from tests.serving.engines import needs_engine

pytestmark = needs_engine
PROMPT = f"{INPUT}>"


@pytest.fixture
def url(served: Served, engine: Engine) -> Iterator[str]:
    app = create_app(engine, served.tokenizer, "base", EXAMPLE.folder / "adapters")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    settled(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def settled(done: Callable[[], bool]) -> None:
    """Wait until something has come to be."""
    for _ in range(400):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to be")


def test_many_clients_while_prefixes_change(url: str, served: Served, engine: Engine) -> None:
    """What is asked under a name that is not touched is answered right; under one that is, by the old or the new."""
    tasks = [*ANSWERS, "swapped"]
    served.bank.add("swapped", served.bank.key_values("upper"))
    stop = threading.Event()

    def swap() -> None:
        with httpx.Client(base_url=url) as client:
            for i in range(10_000):
                path = "reverse" if i % 2 == 0 else "upper"
                client.put("/v1/prefixes/swapped", json={"path": path}).raise_for_status()
                if stop.is_set():
                    return

    def ask(i: int) -> tuple[str, str]:
        task = tasks[i % len(tasks)]
        with httpx.Client(base_url=url, timeout=60) as client:
            response = client.post("/v1/completions", json={"model": task, "prompt": PROMPT}).raise_for_status()
        return task, response.json()["choices"][0]["text"]

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        with ThreadPoolExecutor(16) as pool:
            answered = list(pool.map(ask, range(140)))
    finally:
        stop.set()
        swapper.join()
    allowed = {task: {text} for task, text in ANSWERS.items()} | {"swapped": {ANSWERS["upper"], ANSWERS["reverse"]}}
    assert [(task, text) for task, text in answered if text not in allowed[task]] == []
    assert engine.failure is None
    alive = [length for length in served.bank.lengths if length >= 0]
    assert len(alive) == len(served.bank), "prefixes that were replaced are gone"


def test_a_request_has_one_prefix(url: str, served: Served, tmp_path: Path) -> None:
    """For its tokens and all its answers, while the task changes between a text, which opens the sequence, and none."""
    bank = served.bank
    bank.add_text("one", served.tokenizer, "sort|", served.model)
    bank.save_pretrained(tmp_path)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            bank.load("one", EXAMPLE.folder / "adapters" / "upper", replace=True)
            time.sleep(0.002)
            bank.load("one", tmp_path / "one.safetensors", replace=True)
            time.sleep(0.002)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(60):
                asked = {"model": "one", "prompt": [PROMPT] * 4}
                content = client.post("/v1/completions", json=asked).raise_for_status().json()
                texts = {choice["text"] for choice in content["choices"]}
                tokens = content["usage"]["prompt_tokens"] // 4
                assert (texts, tokens) in (({ANSWERS["sort"]}, 8), ({ANSWERS["upper"]}, 9))
    finally:
        stop.set()
        swapper.join()
    settled(lambda: sum(length >= 0 for length in bank.lengths) == len(bank))


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_hang_up(url: str, engine: Engine, stream: bool) -> None:
    """Their requests leave the batch: without an end token they would run for 50 tokens."""
    engine.ends = []
    original: Any = engine._manager.batch_processor._generation_step

    def slowly(model: Any) -> None:
        time.sleep(0.1)
        original(model)

    engine._manager.batch_processor._generation_step = slowly
    asked = {"model": "upper", "prompt": PROMPT, "max_tokens": 50, "n": 3, "stream": stream}
    with httpx.Client(base_url=url, timeout=60 if stream else 1.5) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=asked) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=asked)
    began = time.monotonic()
    settled(lambda: engine.running == engine.waiting == 0)
    assert time.monotonic() - began < 2.5, "50 tokens would have taken 5 s"
    metrics = httpx.get(f"{url}/metrics").text.splitlines()
    assert 'prefix_attn_requests_total{outcome="cancelled",task="upper"} 3.0' in metrics
