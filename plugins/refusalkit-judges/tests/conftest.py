"""Keep the tests offline and on one thread, give each a cache of its own, and an endpoint on this machine."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Before transformers is imported: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@dataclass
class Answer:
    """Hold what the endpoint does with a request."""

    text: str = ""
    status: int = 200
    body: str | None = None
    """Sent in place of a completion."""
    seconds: float = 0.0


@dataclass
class Chat:
    """Hold an endpoint, what it was sent, and how it answers."""

    base_url: str = ""
    answer: Callable[[int, str], Answer] = lambda number, asked: Answer("refusal")
    """Given the number of the request and what it asks."""
    asked: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    greeted: list[str] = field(default_factory=list)
    models: int = 404
    """The status of the list of models, which many endpoints do not have."""
    at_once: int = 0
    """The most requests there were under way."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def chat() -> Iterator[Chat]:
    served, lock, under_way = Chat(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                under_way[0] += 1
                served.at_once = max(served.at_once, under_way[0])
                served.asked.append(body["messages"][-1]["content"])
                served.keys.append(self.headers["authorization"])
                served.bodies.append(body)
                found = served.answer(len(served.asked), served.asked[-1])
            time.sleep(found.seconds)
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": found.text}}]})
            payload = (text if found.body is None else found.body).encode()
            with lock:
                under_way[0] -= 1
            try:
                self.send_response(found.status)
                self.send_header("retry-after", "0")
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
            except OSError:
                return  # whoever asked has given up

        def do_GET(self) -> None:
            served.greeted.append(self.path)
            self.send_response(served.models)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()
