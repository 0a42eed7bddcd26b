"""Server: the socket, uvicorn over it, and how it stops: running and waiting requests are finished first.

Knows sockets and signals; nothing of what is served.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from localmimo.serve.http.connection import Limits, protocol

BACKLOG = 512
DRAIN_S = 600  # for answers that were begun when the server was asked to stop


class Server(uvicorn.Server):
    """uvicorn that ends quietly on SIGTERM and Ctrl-C; a second signal does not wait for running answers."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits | None = None,
        drain_s: int = DRAIN_S,
        stopping: Callable[[], None] = lambda: None,
    ) -> None:
        limits = limits or Limits()
        self._stopping = stopping
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(limits),
                ws="none",
                lifespan="off",
                loop="asyncio",
                backlog=BACKLOG,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=int(limits.idle_s),
                timeout_graceful_shutdown=drain_s,
                h11_max_incomplete_event_size=limits.head_bytes,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        self.should_exit = True
        self._stopping()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle both signals while serving; elsewhere than in the main thread there are none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)
