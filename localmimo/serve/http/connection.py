"""Connection: uvicorn's HTTP/1.1 protocol with limits on how many there are and how slow they may be.

Knows sockets and their timers; nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any

from h11 import LocalProtocolError
from uvicorn.protocols.http.h11_impl import H11Protocol

from localmimo.serve.response import to_json

REFUSED = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take up."""

    connections: int = 256
    head_s: float = 15.0  # for a request's headers, from the connection's or their first byte
    idle_s: float = 30.0  # between requests
    write_s: float = 30.0  # for a client that reads nothing
    head_bytes: int = 32 << 10


class Connection(H11Protocol):
    """One client. The longest idle ones are closed for new ones when there are too many."""

    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since = time.monotonic()
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        if not self._accept_or_close():
            transport.write(REFUSED)
            transport.close()
        else:
            self._head_timer = self.loop.call_later(self.limits.head_s, self._give_up)

    def _accept_or_close(self) -> bool:
        """Whether this connection may stay, if need be after closing the one that has been idle longest."""
        live = [other for other in self.connections if not other.transport.is_closing()]
        if len(live) <= self.limits.connections:
            return True
        idle = [other for other in live if isinstance(other, Connection) and other.idle and other is not self]
        if idle:
            min(idle, key=lambda other: other._idle_since)._give_up()
        return bool(idle)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        if self.idle and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.head_s, self._give_up)
        super().data_received(data)
        if not self.idle:
            self._head_timer = _stop(self._head_timer)

    def on_response_complete(self) -> None:
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_s, self._give_up)

    def resume_writing(self) -> None:
        self._write_timer = _stop(self._write_timer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _stop(self._head_timer)
        self._write_timer = _stop(self._write_timer)
        super().connection_lost(exc)

    def _give_up(self) -> None:
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has too much of a head, gets an error that clients of every dialect can read."""
        sentence = f"{msg} Headers may have {self.limits.head_bytes:,} bytes."
        error = {"message": sentence, "type": "invalid_request_error", "param": None, "code": None}
        body = to_json({"type": "error", "error": error}).encode()
        head = (
            f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        )
        with contextlib.suppress(LocalProtocolError):
            self.conn.send_failed()
        if self.idle:
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


def protocol(limits: Limits) -> type[Connection]:
    """The protocol with these limits."""
    return type("Connection", (Connection,), {"limits": limits})


def _stop(timer: asyncio.TimerHandle | None) -> Any:
    if timer is not None:
        timer.cancel()
    return None
