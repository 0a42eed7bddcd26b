"""Sessions of one engine, for one caller at a time: the plan counts the memory of these and of no more.

Knows sessions and threads. Must not know prompts, models or how an answer is made.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from localmimo.decode.session import Session
from localmimo.errors import BadRequest

CLOSE_S = 10.0  # how long `close` waits for an answer in another thread, which ends within a layer
ENDED = "This session's `with` block has ended: open another with engine.session()."


class Sessions:
    """Creates sessions when they are first needed and keeps them, so that the next caller finds what they hold."""

    def __init__(self, new_session: Callable[[], Session], released: Callable[[], object]) -> None:
        """released: called whenever a caller is through with the sessions."""
        self._new_session = new_session
        self._released = released
        self._all: list[Session] = []
        self._handles: list[Session] = []  # of the caller whose turn it is
        self._holder: int | None = None  # this caller's thread
        self._lock = threading.Lock()  # not re-entrant: a generator may be advanced from another thread
        self._closed = ""

    def __iter__(self) -> Iterator[Session]:
        return iter(self._all)

    @property
    def is_closed(self) -> bool:
        return bool(self._closed)

    @contextmanager
    def use(self, n: int = 1) -> Iterator[list[Session]]:
        """Handles of all sessions, at least n, until the block ends. Other callers wait.

        Raises BadRequest where this thread is using them already, or after `close`.
        """
        self.demand_open()
        if self._holder == threading.get_ident():
            raise BadRequest(
                "The engine is answering already in this thread: finish or close that answer first."
            )
        with self._lock:
            self.demand_open()
            self._holder = threading.get_ident()
            try:
                while len(self._all) < n:
                    self._all.append(self._new_session())
                self._handles = [session.handle() for session in self._all]
                yield self._handles
            finally:
                for handle in self._handles:
                    handle.end(ENDED)
                self._handles, self._holder = [], None
                if not self._closed:
                    self._released()

    @contextmanager
    def use_one(self, session: Session | None) -> Iterator[Session]:
        """The first session's handle; or `session`, a handle whose block is still open.

        Raises BadRequest where its block has ended or another engine made it.
        """
        if session is None:
            with self.use() as handles:
                yield handles[0]
            return
        self.demand_open()
        if not any(session is handle for handle in self._handles):
            raise BadRequest(session.ended or "This session belongs to another engine: use engine.session().")
        yield session

    def close(self, why: str) -> None:
        """Refuse everything from now on, with `why` as the sentence; an answer in another thread is stopped."""
        self._closed = why
        for handle in self._handles:
            handle.end(why)
        if self._holder not in (None, threading.get_ident()) and self._lock.acquire(timeout=CLOSE_S):
            self._lock.release()
        self._all.clear()

    def demand_open(self) -> None:
        """Raise BadRequest after `close`."""
        if self._closed:
            raise BadRequest(self._closed)
