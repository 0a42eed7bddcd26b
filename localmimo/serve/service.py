"""Service: the engine behind the server, from loading to stopping, with its queue, its worker and its counters.

Knows requests and their order; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from localmimo.serve.api.parameters import Request
from localmimo.serve.context import ServerContext
from localmimo.serve.errors import ApiError
from localmimo.serve.metrics import Metrics
from localmimo.serve.queue import QueueFull, RequestQueue, Ticket
from localmimo.serve.session_store import SessionStore
from localmimo.serve.worker import Job, Worker

if TYPE_CHECKING:
    from localmimo.engine import Engine

LOADING_RETRY_S = 10
State = Literal["loading", "ok", "busy", "stopping"]


class Service:
    """One engine for many clients. It answers once it is `ready`."""

    def __init__(
        self,
        n_waiting: int = 8,
        sessions_dir: Path | None = None,
        sessions_bytes: int = 0,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._note = note
        self._sessions = (sessions_dir, sessions_bytes)
        self.queue = RequestQueue(n_waiting)
        self.metrics = Metrics()
        self.began = int(time.time())
        self.stopping = False
        self.loaded: float | None = None  # share of the dense tensors read, where it is known
        self._worker: Worker | None = None
        self._context: ServerContext | None = None

    def load(self, done: int, total: int) -> None:
        """Bytes read so far, and in all; from any thread."""
        self.loaded = done / total if total else None

    def ready(self, engine: Engine) -> None:
        """The engine is loaded; its tokenizer and template are opened here, so that a broken one fails now."""
        engine.encode("")
        folder, limit_bytes = self._sessions
        session_store = None
        if folder is not None:
            session_store = SessionStore(folder / engine.pack.id[:16], limit_bytes, engine.prompts.turn_cache)
        self._worker = Worker(engine, self._finished, session_store)
        self._context = ServerContext(str(engine.pack.name), engine.tokenizer)

    @property
    def state(self) -> State:
        if self.stopping:
            return "stopping"
        return "loading" if self._worker is None else "busy" if self.queue.busy else "ok"

    @property
    def worker(self) -> Worker:
        """Raises ApiError while the model is loading."""
        if self._worker is None:
            far = "" if self.loaded is None else f" ({self.loaded:.0%})"
            sentence = f"The model is still loading{far}; ask again in a moment."
            raise ApiError("loading", sentence, retry_s=LOADING_RETRY_S)
        return self._worker

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    @property
    def context(self) -> ServerContext:
        """What dialects read and write with. Raises ApiError while the model is loading."""
        assert self.worker and self._context
        return self._context

    @property
    def model(self) -> str:
        """The name that clients see."""
        return self.context.model

    async def begin(self, request: Request) -> tuple[Job, Ticket]:
        """Check the prompt and enter the queue. Raises ApiError and the engine's errors, before anything is sent."""
        try:
            self.queue.check()  # before the work of writing the prompt
            prompt = await asyncio.to_thread(self.worker.prompt, request)
            ticket = self.queue.join()
        except QueueFull as full:
            raise ApiError(
                "full",
                f"{full.n_waiting} requests are waiting, as many as may; ask again in {full.retry_s} s.",
                retry_s=full.retry_s,
            ) from None
        job = Job(request, prompt)
        self.worker.begin(job, ticket)
        return job, ticket

    def drop(self, job: Job) -> None:
        """The client no longer waits for this answer."""
        self.worker.drop(job)

    def exposition(self) -> str:
        """All counters and gauges as text."""
        worker = self._worker
        gauges = {
            "localmimo_ready": ("Whether the model is loaded.", float(worker is not None)),
            "localmimo_busy": ("Whether an answer is being made.", float(self.queue.busy)),
            "localmimo_queue_waiting": ("Requests that wait.", float(self.queue.n_waiting)),
            "localmimo_queue_limit": ("Requests that may wait.", float(self.queue.limit)),
        }
        if worker is not None:
            gauges["localmimo_context_tokens"] = ("Positions of the context.", float(worker.engine.context))
            gauges["localmimo_turns_kept"] = (
                "TurnCache whose exact tokens are remembered.",
                float(len(worker.engine.prompts.turn_cache)),
            )
            if (session_store := worker.session_store) is not None:
                gauges["localmimo_sessions"] = ("Conversations on disk.", float(len(session_store)))
                gauges["localmimo_sessions_bytes"] = (
                    "Bytes of conversations on disk.",
                    float(session_store.n_bytes),
                )
                gauges["localmimo_sessions_loaded"] = (
                    "Conversations taken up from disk.",
                    float(session_store.n_loaded),
                )
        return self.metrics.text(worker.current if worker else None, gauges)

    def _finished(self, job: Job) -> None:
        self.metrics.finished(job)
        stats = job.stats
        self._note(
            f"{stats.prompt_tokens}+{stats.generated_tokens} tokens, {stats.reused_tokens} kept · "
            f"first token {stats.first_token_s:.1f} s · {stats.decode_tps:.1f} tok/s · {job.answer.finish_reason}"
        )

    async def close(self) -> None:
        """Stop the worker; what it was answering ends as cancelled."""
        self.stopping = True
        if self._worker is not None:
            await self._worker.close()
