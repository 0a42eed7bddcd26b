"""Streaming response: what is sent for one request: events while the answer is made, or one object at its end.

Notices when the client disconnects, and sends a comment every few seconds so that no proxy closes the connection.
Knows HTTP's messages and jobs; nothing of what the dialect writes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from localmimo.decode.steps import Step
from localmimo.serve.api.parameters import Request
from localmimo.serve.errors import ApiError, api_error_of
from localmimo.serve.queue import Ticket
from localmimo.serve.worker import Job

KEEP_ALIVE_S = 5.0
WARNING_HEADER = "x-localmimo-warnings"
MAX_WARNING_CHARS = 1000
log = logging.getLogger("localmimo.serve")


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event; `data` as text is sent as it is."""

    data: Mapping[str, Any] | str
    name: str | None = None

    def encode(self) -> bytes:
        data = self.data if isinstance(self.data, str) else to_json(self.data)
        head = f"event: {self.name}\n" if self.name else ""
        return f"{head}data: {data}\n\n".encode("utf-8", "replace")


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Dialect(Protocol):
    """One request in one dialect, and how its answer is written."""

    request: Request

    def first_events(self, job: Job) -> Iterable[Event]: ...

    def push(self, step: Step) -> Iterable[Event]:
        """The events of a step; where the answer is sent whole they are dropped, but every step is pushed."""
        ...

    def last_events(self, job: Job) -> Iterable[Event]: ...

    def whole(self, job: Job) -> dict[str, Any]: ...

    def broken(self, api_error: ApiError) -> Iterable[Event]: ...

    def pause(self, note: str) -> Event | None:
        """What keeps the connection alive; None: a comment with the note."""
        ...

    @staticmethod
    def error_body(api_error: ApiError) -> dict[str, Any]: ...


class StreamingResponse:
    """An ASGI response. The job is cancelled where the client leaves before its end."""

    def __init__(
        self,
        dialect: Dialect,
        job: Job,
        ticket: Ticket,
        drop: Callable[[Job], None],
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self._dialect = dialect
        self._job = job
        self._ticket = ticket
        self._drop = drop
        self._keep_alive_s = keep_alive_s
        self._began = False
        self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        disconnected = asyncio.ensure_future(_disconnected(receive))
        try:
            if self._dialect.request.stream:
                await self._events(send, disconnected)
            else:
                await self._whole(send, disconnected)
        except Exception as error:  # a bug of ours: the client gets an error, the log the traceback
            await self._fail(send, error)
        finally:
            disconnected.cancel()
            self._drop(self._job)

    async def _whole(self, send: Send, disconnected: asyncio.Future[None]) -> None:
        while (item := await self._next(disconnected, None)) is not None:
            if isinstance(item, BaseException):
                await self._refuse(send, item)
                return
            if isinstance(item, Step):
                list(self._dialect.push(item))
        if not self._job.complete:  # the client has left, or the server stops
            await self._refuse(send, ApiError("loading", "The request was dropped.", retry_s=30))
        else:
            await respond(send, 200, self._dialect.whole(self._job), warning_headers(self._dialect.request))

    async def _events(self, send: Send, disconnected: asyncio.Future[None]) -> None:
        item = await self._next(disconnected, self._keep_alive_s)
        if isinstance(item, BaseException):
            await self._refuse(send, item)
            return
        self._began = True
        headers = {"cache-control": "no-store", **warning_headers(self._dialect.request)}
        await _start(send, 200, "text/event-stream; charset=utf-8", headers)
        await _send(send, self._dialect.first_events(self._job))
        while item is not None:
            events: list[bytes] = []
            for piece in (item, *self._pending()):
                events += self._encode(piece)
            await _body(send, b"".join(events))
            item = None if self._ended else await self._next(disconnected, self._keep_alive_s)
        await _body(send, b"", more=False)

    def _encode(self, item: Step | BaseException | float) -> list[bytes]:
        """The bytes of the events of one item."""
        match item:
            case float():
                event = self._dialect.pause(self._note())
                return [event.encode() if event else f": {self._note()}\n\n".encode()]
            case Step():
                events = [*self._dialect.push(item)]
                if item.finish_reason is not None:
                    self._ended = True
                    events += self._dialect.last_events(self._job)
            case _:
                self._ended = True
                events = [*self._dialect.broken(reported(item))]
        return [event.encode() for event in events]

    def _pending(self) -> Iterable[Step | BaseException]:
        while not self._job.steps.empty():
            item = self._job.steps.get_nowait()
            if item is None:
                self._job.steps.put_nowait(None)
                return
            yield item

    async def _next(
        self, disconnected: asyncio.Future[None], wait_s: float | None
    ) -> Step | BaseException | float | None:
        """The next item; a number where none came in time; None at the end or where the client has disconnected."""
        get: asyncio.Future[Any] = asyncio.ensure_future(self._job.steps.get())
        done, _ = await asyncio.wait({get, disconnected}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if get in done:
            item: Step | BaseException | None = get.result()
            return item
        get.cancel()
        return None if disconnected in done else 0.0

    def _note(self) -> str:
        if before := self._ticket.n_before:
            return f"waiting, {before} before this one"
        done, total = self._job.reading
        if self._job.answer.tokens:
            return f"writing, {len(self._job.answer.tokens)} tokens"
        return f"reading {done}/{total}"

    async def _fail(self, send: Send, error: Exception) -> None:
        if self._began:
            await _send(send, self._dialect.broken(reported(error)))
            await _body(send, b"", more=False)
        else:
            await self._refuse(send, error)

    async def _refuse(self, send: Send, error: BaseException) -> None:
        api_error = reported(error)
        await respond(send, api_error.status, self._dialect.error_body(api_error), api_error.headers)


def warning_headers(request: Request) -> dict[str, str]:
    """The header that says what of a request was left out; none where nothing was.

    Printable ASCII without white space at its ends, which is all that a header may hold.
    """
    text = "; ".join(request.warnings).encode("ascii", "replace").decode()
    text = "".join(char if char.isprintable() else "?" for char in text)[:MAX_WARNING_CHARS].strip()
    return {WARNING_HEADER: text} if text else {}


def reported(error: BaseException) -> ApiError:
    """The API error for the client; an error of the server itself goes to the log with its traceback."""
    api_error = api_error_of(error)
    if api_error.kind == "broken":
        log.error("%s", api_error.sentence, exc_info=error)
    return api_error


async def respond(
    send: Send, status: int, value: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> None:
    """One JSON object as the whole response."""
    body = to_json(value).encode("utf-8", "replace")
    await _start(send, status, "application/json", {**(headers or {}), "content-length": str(len(body))})
    await _body(send, body, more=False)


async def _start(send: Send, status: int, kind: str, headers: Mapping[str, str]) -> None:
    lines = {"content-type": kind, **headers}
    encoded = [(name.encode(), value.encode()) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})


async def _send(send: Send, events: Iterable[Event]) -> None:
    await _body(send, b"".join(event.encode() for event in events))


async def _body(send: Send, body: bytes, more: bool = True) -> None:
    if body or not more:
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
