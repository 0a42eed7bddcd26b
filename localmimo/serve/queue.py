"""Request queue: who waits for the engine, first come, first served, and who is refused.

Knows no engine and no HTTP. Belongs to one event loop; not for other threads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque


class QueueFull(Exception):
    """The queue is full; `retry_s` is when there should be space."""

    def __init__(self, n_waiting: int, retry_s: int) -> None:
        super().__init__(f"{n_waiting} requests are waiting already")
        self.n_waiting = n_waiting
        self.retry_s = retry_s


class Ticket:
    """One request's ticket in the queue, to be returned whatever happens."""

    def __init__(self, queue: RequestQueue) -> None:
        self._queue = queue
        self._turn = asyncio.Event()
        self._began: float | None = None

    @property
    def n_before(self) -> int:
        """How many are served before this one."""
        return self._queue.index(self)

    async def turn(self) -> None:
        """Wait until it is this request's turn."""
        await self._turn.wait()

    def called(self) -> None:
        self._began = time.monotonic()
        self._turn.set()

    def leave(self) -> None:
        """Return the ticket: after the answer, or without one. A second call does nothing."""
        took = None if self._began is None else time.monotonic() - self._began
        self._queue.remove(self, took)


class RequestQueue:
    """One is served, at most `n_waiting` wait."""

    def __init__(self, n_waiting: int) -> None:
        self.limit = n_waiting
        self.mean_s = 0.0  # of an answer, the recent ones weighing more
        self._tickets: deque[Ticket] = deque()

    @property
    def n_waiting(self) -> int:
        return max(0, len(self._tickets) - 1)

    @property
    def busy(self) -> bool:
        return bool(self._tickets)

    def check(self) -> None:
        """Raises QueueFull where no request may join."""
        if len(self._tickets) > self.limit:
            raise QueueFull(self.n_waiting, self.retry_s())

    def join(self) -> Ticket:
        """A ticket at the end. Raises QueueFull."""
        self.check()
        ticket = Ticket(self)
        self._tickets.append(ticket)
        if len(self._tickets) == 1:
            ticket.called()
        return ticket

    def retry_s(self) -> int:
        """Seconds until a ticket should be free: about one answer's time."""
        return min(600, max(1, math.ceil(self.mean_s)))

    def index(self, ticket: Ticket) -> int:
        return self._tickets.index(ticket) if ticket in self._tickets else 0

    def remove(self, ticket: Ticket, took_s: float | None) -> None:
        if ticket not in self._tickets:
            return
        first = self._tickets[0] is ticket
        self._tickets.remove(ticket)
        if took_s is not None:
            self.mean_s = took_s if self.mean_s == 0 else 0.8 * self.mean_s + 0.2 * took_s
        if first and self._tickets:
            self._tickets[0].called()
