"""Line: who waits for the engine, first come, first served, and who is turned away.

Knows no engine and no HTTP. Lives on one event loop; none of it is for other threads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque


class QueueFull(Exception):
    """The queue is full; `retry_s` is when one should be."""

    def __init__(self, n_waiting: int, retry_s: int) -> None:
        super().__init__(f"{n_waiting} requests are waiting already")
        self.n_waiting = n_waiting
        self.retry_s = retry_s


class Ticket:
    """One request's ticket in the queue, to be given back whatever happens."""

    def __init__(self, line: RequestQueue) -> None:
        self._line = line
        self._turn = asyncio.Event()
        self._began: float | None = None

    @property
    def n_before(self) -> int:
        """How many are served before this one."""
        return self._line.index(self)

    async def turn(self) -> None:
        """Wait until it is this request's turn."""
        await self._turn.wait()

    def called(self) -> None:
        self._began = time.monotonic()
        self._turn.set()

    def leave(self) -> None:
        """Give the ticket back: after the answer, or without one. Leaving twice is leaving once."""
        took = None if self._began is None else time.monotonic() - self._began
        self._line.remove(self, took)


class RequestQueue:
    """One is served, at most `n_waiting` wait."""

    def __init__(self, n_waiting: int) -> None:
        self.limit = n_waiting
        self.mean_s = 0.0  # of an answer, the recent ones weighing more
        self._places: deque[Ticket] = deque()

    @property
    def n_waiting(self) -> int:
        return max(0, len(self._places) - 1)

    @property
    def busy(self) -> bool:
        return bool(self._places)

    def check(self) -> None:
        """Raises QueueFull where no request may join."""
        if len(self._places) > self.limit:
            raise QueueFull(self.n_waiting, self.retry_s())

    def join(self) -> Ticket:
        """A ticket at the end. Raises QueueFull."""
        self.check()
        ticket = Ticket(self)
        self._places.append(ticket)
        if len(self._places) == 1:
            ticket.called()
        return ticket

    def retry_s(self) -> int:
        """Seconds until a ticket should be free: about one answer's time."""
        return min(600, max(1, math.ceil(self.mean_s)))

    def index(self, ticket: Ticket) -> int:
        return self._places.index(ticket) if ticket in self._places else 0

    def remove(self, ticket: Ticket, took_s: float | None) -> None:
        if ticket not in self._places:
            return
        first = self._places[0] is ticket
        self._places.remove(ticket)
        if took_s is not None:
            self.mean_s = took_s if self.mean_s == 0 else 0.8 * self.mean_s + 0.2 * took_s
        if first and self._places:
            self._places[0].called()
