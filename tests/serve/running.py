"""A server that really runs: uvicorn on a loopback port in a thread, over the embedded model.

`Scripted` makes the model say what a script says: the tokens are forced, everything around them is real.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from localmimo.decode import generation as generate
from localmimo.decode.draft_depth import FixedDepth
from localmimo.engine import Engine
from localmimo.serve.app import make_app
from localmimo.serve.http.auth import AccessCheck
from localmimo.serve.http.connection import Limits
from localmimo.serve.http.listen import listen
from localmimo.serve.server import Server
from localmimo.serve.service import Service


class Running:
    """One running server. `http` is a client of it."""

    def __init__(
        self,
        engine: Engine | None,
        *,
        guard: AccessCheck | None = None,
        n_waiting: int = 8,
        limits: Limits | None = None,
        keep_alive_s: float = 5.0,
        send_buffer: int | None = None,
        sessions_dir: Path | None = None,
        sessions_bytes: int = 0,
    ) -> None:
        self.service = Service(n_waiting, sessions_dir, sessions_bytes)
        if engine is not None:
            self.service.ready(engine)
        self._sock = listen("127.0.0.1", 0)
        if send_buffer is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.port: int = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(make_app(self.service, guard or AccessCheck(), keep_alive_s), limits, drain_s=20)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.http = httpx2.Client(base_url=self.url, timeout=60)

    async def _serve(self) -> None:
        await self.server.serve(sockets=[self._sock])
        await self.service.close()

    def __enter__(self) -> Running:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self.server.started:
            assert time.monotonic() < deadline and self._thread.is_alive()
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx2.Response:
        return self.http.post(path, json=body, **options)

    def events(self, path: str, body: dict[str, Any]) -> list[tuple[str | None, Any]]:
        """(event name, data) of every server-sent event; comments as (":", text)."""
        with self.http.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return list(parse_events(response.iter_lines()))

    def wait_idle(self) -> None:
        wait_for(lambda: not self.service.queue.busy)


def wait_for(holds: Callable[[], object], limit_s: float = 20) -> None:
    """Wait until something holds; fail where it does not within the limit."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def parse_events(lines: Iterator[str]) -> Iterator[tuple[str | None, Any]]:
    name = None
    for line in lines:
        if line.startswith(":"):
            yield ":", line[1:].strip()
        elif line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield name, data if data == "[DONE]" else json.loads(data)
            name = None


class Scripted:
    """Texts that the model says, one after the other, whatever it would like to say."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.texts: list[str] = []
        self.delay_s = 0.0
        self._tokens: list[int] = []

    def say(self, *texts: str) -> None:
        self.texts += texts

    def pick(self, logits: torch.Tensor, *_: Any) -> int:
        time.sleep(self.delay_s)
        if not self._tokens:
            eos = self.engine.tokenizer.token_id("<|im_end|>")
            assert eos is not None
            self._tokens = [*self.engine.encode(self.texts.pop(0)), eos]
        return self._tokens.pop(0)


@contextmanager
def scripted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    script = Scripted(engine)
    monkeypatch.setattr(generate, "pick", script.pick)
    monkeypatch.setattr(engine, "_depth_policy", FixedDepth(0))  # drafts would be picked from the script too
    yield script
    assert not script.texts, "the script was not said to its end"
