"""A Hub on this machine: folders served as repositories, with the headers that huggingface_hub asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

MAIN, OLD = "a" * 40, "b" * 40
REVISIONS = {"main": MAIN, MAIN: MAIN, "v1": OLD, OLD: OLD}


@contextmanager
def serving(repositories: dict[str, dict[str, Path]], cache: Path, monkeypatch: pytest.MonkeyPatch
            ) -> Iterator[list[str]]:  # fmt: skip
    """Serve ``{"owner/name": {commit: folder}}``; yields the files that are fetched, in order."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, with_body: bool) -> None:
            owner, name, _, revision, file = unquote(self.path).lstrip("/").split("/", 4)
            commits = repositories.get(f"{owner}/{name}")
            commit = REVISIONS.get(revision)
            error = "RepoNotFound" if commits is None else "RevisionNotFound" if commit not in commits else None
            path = None if error or commits is None or commit is None else commits[commit] / file
            if path is None or not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", error or "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", str(commit))
            self.end_headers()
            if with_body:
                fetched.append(file)
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield fetched
        server.shutdown()
