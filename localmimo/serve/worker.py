"""Worker: the one thread that runs the engine, and its jobs.

Knows the engine and its threads; nothing of HTTP or of dialects.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from localmimo.chat.prompt import Prompt
from localmimo.decode.answer import Answer
from localmimo.decode.steps import Stats, Step
from localmimo.errors import ContextFull
from localmimo.serve.api.parameters import Request
from localmimo.serve.queue import Ticket
from localmimo.serve.session_store import SessionStore

if TYPE_CHECKING:
    from localmimo.decode.session import Session
    from localmimo.engine import Engine


class Job:
    """One answer being made. `steps` gives the steps, then the error if there was one, then None."""

    def __init__(self, request: Request, prompt: Prompt) -> None:
        self.request = request
        self.prompt = prompt
        self.cancel = threading.Event()
        self.steps: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()
        self.reading = (0, 0)  # tokens of the prompt read, to read
        self.stop_text: str | None = None  # the stop string that ended it
        self.answer = Answer()
        self.n_thought = 0  # tokens of thinking
        self.complete = False
        self.task: asyncio.Task[None] | None = None

    @property
    def stats(self) -> Stats:
        """The figures so far."""
        return self.answer.stats or Stats()

    def add(self, step: Step) -> None:
        self.answer.add(step)
        self.n_thought += step.token is not None and step.kind == "thinking"
        self.complete = step.finish_reason is not None

    def read(self, done: int, total: int) -> None:
        self.reading = (done, total)


class Worker:
    """Owns the thread. `prompt` may be called from any thread, `run` from the event loop."""

    def __init__(
        self,
        engine: Engine,
        finished: Callable[[Job], None] = lambda job: None,
        session_store: SessionStore | None = None,
    ) -> None:
        self.engine = engine
        self.session_store = session_store
        self.current: Job | None = None
        self._finished = finished
        self._thread = ThreadPoolExecutor(1, "localmimo-engine")
        self._tasks: set[asyncio.Task[None]] = set()

    def prompt(self, request: Request) -> Prompt:
        """The prompt to answer. Raises BadRequest, ContextFull."""
        prompts = self.engine.prompts
        if request.messages is not None:
            prompt = prompts.build(
                prompts.turn_cache.restore(request.messages), request.options.tools, request.options.think
            )
        elif request.tokens is not None:
            prompt = Prompt("", request.tokens)
        else:
            text = request.text or ""
            known, tokens = prompts.turn_cache.longest_prefix(text)
            prompt = Prompt(text, tokens + self.engine.encode(text[known:]))
        self._check(request, prompt.tokens)
        return prompt

    def _check(self, request: Request, tokens: list[int]) -> None:
        limits = self.engine.limits
        limits.check_vocabulary(request.options.sampling.logit_bias)
        try:
            limits.check(tokens, n_new=1)
        except ContextFull:
            needed = len(tokens) + (request.options.max_tokens or 1)
            raise ContextFull(
                f"This model's context is {limits.context:,} tokens; the request has {len(tokens):,} in its prompt "
                f"and needs {needed:,}: shorten the conversation, or start the server with a longer --context.",
                n_tokens=len(tokens),
                context=limits.context,
            ) from None

    def begin(self, job: Job, ticket: Ticket) -> None:
        """Answer the job when its turn comes; the ticket is given back when the engine has finished."""
        job.task = asyncio.get_running_loop().create_task(self._serve(job, ticket))
        self._tasks.add(job.task)
        job.task.add_done_callback(self._tasks.discard)

    def drop(self, job: Job) -> None:
        """The client no longer wants the answer: stop it within a layer, or take it out of the queue."""
        job.cancel.set()
        if job.task is not None and job is not self.current:
            job.task.cancel()

    async def _serve(self, job: Job, ticket: Ticket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await ticket.turn()
            self.current = job
            await loop.run_in_executor(self._thread, self._run, job, loop)
        finally:
            if self.current is job:
                self.current = None
            ticket.leave()
            self._finished(job)
            job.steps.put_nowait(None)

    def _run(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        try:
            if not job.cancel.is_set():
                self._answer(job, lambda step: loop.call_soon_threadsafe(job.steps.put_nowait, step))
        except BaseException as error:  # whatever it is, the client gets an error
            loop.call_soon_threadsafe(job.steps.put_nowait, error)

    def _answer(self, job: Job, deliver: Callable[[Step], object]) -> None:
        with self.engine.session() as session:
            if self.session_store is not None:
                self.session_store.prepare(session, job.prompt.tokens)
            for step in self._steps(job, session):
                job.add(step)
                if step.finish_reason is not None:
                    self._close(job)
                deliver(step)
        if self.session_store is not None:
            self.session_store.learn(job.stats)

    def _steps(self, job: Job, session: Session) -> Iterator[Step]:
        request = job.request
        options = replace(request.options, cancel=job.cancel, progress=job.read)
        return self.engine.answer(job.prompt, options, chat=request.messages is not None, session=session)

    def _close(self, job: Job) -> None:
        """Find the stop string that ended a complete answer."""
        text = self.engine.decode(job.answer.tokens)
        found = [(text.find(stop), stop) for stop in job.request.options.stop if stop in text]
        job.stop_text = min(found)[1] if found else None

    async def close(self) -> None:
        """Stop running and waiting jobs, save the session to the session store, and wait for the thread."""
        if self.current is not None:
            self.current.cancel.set()
        waiting = [task for task in self._tasks if self.current is None or task is not self.current.task]
        for task in waiting:
            task.cancel()
        loop = asyncio.get_running_loop()
        if self.session_store is not None:
            await loop.run_in_executor(self._thread, self._save_session, self.session_store)
        await loop.run_in_executor(None, self._thread.shutdown)

    def _save_session(self, session_store: SessionStore) -> None:
        with self.engine.session() as session:
            session_store.leave(session)
