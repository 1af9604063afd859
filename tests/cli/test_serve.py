"""``prefix-attn serve``: the command, in a process of its own, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from prefix_attn.cli.example import ANSWERS, INPUT, ShippedExample
from prefix_attn.cli.serve import listen
from tests.cli.conftest import Run
from tests.serving.engines import OLD, needs_engine

PROMPT = f"{INPUT}>"


@contextmanager
def killed_at_last(process: subprocess.Popen[str]) -> Iterator[None]:
    """So that a test that fails does not wait for it."""
    try:
        yield
    finally:
        process.kill()


@contextmanager
def one_at_a_time(example: ShippedExample) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The command with a cache for one request: its process, where it serves, and its task."""
    task, folder = example.adapters[0]
    command = [sys.executable, "-m", "prefix_attn", "serve", "--model", example.model, f"--adapter={task}={folder}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (
        subprocess.Popen([*command, "--port", "0", "--cache-tokens", "64"], **pipes, text=True) as server,
        killed_at_last(server),
    ):
        assert server.stdout is not None
        yield server, [server.stdout.readline() for _ in range(3)][2].strip(), task


@needs_engine
def test_the_command_serves_until_it_is_interrupted(example: ShippedExample, tmp_path: Path) -> None:
    adapters = [f"--adapter={task}={folder}" for task, folder in example.adapters[:2]]
    command = [sys.executable, "-m", "prefix_attn", "serve", "--model", example.model, *adapters, "--port", "0"]
    command += ["--cache-tokens", "512", "--name", "letters", "--prefixes", str(tmp_path)]
    for task in ("sort", "other"):
        shutil.copytree(example.folder / "adapters" / task.replace("other", "sort"), tmp_path / task)
    config = tmp_path / "other" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "someone/other"}))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as server, killed_at_last(server):
        assert server.stdout is not None
        welcome = [server.stdout.readline() for _ in range(3)]
        assert welcome[0] == "letters, and 2 tasks: upper, reverse\n"
        assert "running requests may hold 512 tokens" in welcome[1]
        with httpx.Client(base_url=welcome[2].strip(), timeout=60) as client:
            for path in ("other", "other", "sort"):
                client.put("prefixes/sort", json={"path": path}).raise_for_status()
            for task in ("upper", "reverse", "sort"):
                answer = client.post("completions", json={"model": task, "prompt": PROMPT}).json()
                assert answer["choices"][0]["text"] == ANSWERS[task]
            models = [model["id"] for model in client.get("models").json()["data"]]
        assert models == ["letters", "upper", "reverse", "sort"]
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0
        assert server.stderr is not None
        log = server.stderr.read().splitlines()
    doubts = [line for line in log if "this adapter was trained on 'someone/other'" in line]
    assert len(doubts) == 2
    assert all(line.startswith("warning: ") for line in doubts)
    assert not any("warnings.warn" in line or "UserWarning" in line for line in log)


@needs_engine
def test_a_second_interruption_breaks_requests_off(example: ShippedExample) -> None:
    """They are told so, as of every other failure, and there is no traceback."""
    with one_at_a_time(example) as (server, url, task), ThreadPoolExecutor() as pool:
        asked = {"model": task, "prompt": [PROMPT] * 1000}  # one at a time
        answer = pool.submit(httpx.post, f"{url}/completions", json=asked, timeout=60)
        while "prefix_attn_running 1.0" not in httpx.get(url.replace("/v1", "/metrics"), timeout=60).text.splitlines():
            time.sleep(0.05)
        for _ in range(2):
            server.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert answer.result().status_code == 503
        assert set(answer.result().json()["error"]) == {"message", "type", "param", "code"}
        assert server.wait(timeout=60) == 0
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()


@needs_engine
def test_a_client_that_is_stuck_does_not_keep_the_server(example: ShippedExample) -> None:
    with one_at_a_time(example) as (server, address, _):
        url = httpx.URL(address)
        with socket.create_connection((url.host, url.port)) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            time.sleep(0.5)
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) in (0, -signal.SIGTERM)


def test_what_is_written_is_sent_at_once() -> None:
    """Of a connection that the server accepts, and asyncio takes as it is."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@needs_engine
def test_a_port_that_is_taken(run: Run, example: ShippedExample, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("serve", "--model", example.model, "--prefixes", tmp_path, "--port", port)
    assert result.exit_code == 2
    assert "ddress already in use" in result.stderr


def test_without_any_prefix(run: Run, example: ShippedExample) -> None:
    result = run("serve", "--model", example.model)
    assert result.exit_code == 2
    assert "--adapter" in result.stderr


@needs_engine
def test_a_task_that_is_called_like_the_model(run: Run, example: ShippedExample) -> None:
    (task, folder), *_ = example.adapters
    result = run("serve", "--model", example.model, "--adapter", f"{task}={folder}", "--name", task)
    assert result.exit_code == 2
    assert "give the base model another" in result.stderr


def test_without_the_extra(run: Run, example: ShippedExample, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run("serve", "--model", example.model, "--prefixes", tmp_path)
    assert result.exit_code == 2
    assert "pip install 'prefix-attn[serve]'" in result.stderr


@pytest.mark.skipif(not OLD, reason="this transformers has the engine")
def test_older_transformers_are_refused(run: Run, example: ShippedExample, tmp_path: Path) -> None:
    result = run("serve", "--model", example.model, "--prefixes", tmp_path)
    assert result.exit_code == 2
    assert "5.23" in result.stderr
