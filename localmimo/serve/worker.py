"""Worker: the one thread that runs the engine, and the jobs that it is given.

Knows the engine and its threads; nothing of HTTP or of dialects.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from localmimo.chat import parse_message
from localmimo.errors import BadRequest, ContextFull
from localmimo.generate import Stats, Step
from localmimo.serve.ask import Ask
from localmimo.serve.line import Place
from localmimo.serve.reply import Reply
from localmimo.serve.turns import LONGEST_OPENING, Turns

if TYPE_CHECKING:
    from localmimo.engine import Engine

END_TOKENS = 64  # of the prompt, whose text shows how the turn was opened


class Job:
    """One answer being made. `steps` gives what comes: steps, at last the error if there was one, then None."""

    def __init__(self, ask: Ask, tokens: list[int]) -> None:
        self.ask = ask
        self.tokens = tokens
        self.cancel = threading.Event()
        self.steps: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()
        self.reading = (0, 0)  # tokens of the prompt read, to read
        self.stop_text: str | None = None  # the stop string that ended it
        self.reply = Reply()
        self.task: asyncio.Task[None] | None = None

    def read(self, done: int, total: int) -> None:
        self.reading = (done, total)


class Worker:
    """Owns the thread. `prompt` may be called from any thread, `run` from the event loop."""

    def __init__(self, engine: Engine, finished: Callable[[Job], None] = lambda job: None) -> None:
        self.engine = engine
        self.turns = Turns(engine.template, engine.tokenizer.encode, engine.prompts.marker)
        self.current: Job | None = None
        self._finished = finished
        self._thread = ThreadPoolExecutor(1, "localmimo-engine")
        self._tasks: set[asyncio.Task[None]] = set()

    def prompt(self, ask: Ask) -> list[int]:
        """The tokens to answer. Raises BadRequest, ContextFull."""
        if ask.messages is not None:
            tokens = self.turns.prompt(ask.messages, ask.tools, ask.think)
        else:
            tokens = ask.tokens if ask.tokens is not None else self.engine.encode(ask.text or "")
        self._check(ask, tokens)
        return tokens

    def _check(self, ask: Ask, tokens: list[int]) -> None:
        vocabulary = self.engine.config.vocab_size
        if not tokens:
            raise BadRequest("The prompt is empty: say something.")
        for token in (*ask.sampling.logit_bias, *(ask.tokens or ())):
            if not 0 <= token < vocabulary:
                raise BadRequest(f"Token {token} is outside the model's vocabulary of {vocabulary:,}.")
        wanted = len(tokens) + (ask.max_tokens or 1)
        if len(tokens) >= self.engine.context:
            raise ContextFull(
                f"This model's context is {self.engine.context:,} tokens; the request has {len(tokens):,} in its "
                f"prompt and needs {wanted:,}: shorten the conversation, or start the server with a longer --context."
            )

    def begin(self, job: Job, place: Place) -> None:
        """Have the job answered when it is its turn; the place is left when the engine is through with it."""
        job.task = asyncio.get_running_loop().create_task(self._serve(job, place))
        self._tasks.add(job.task)
        job.task.add_done_callback(self._tasks.discard)

    def drop(self, job: Job) -> None:
        """Nobody wants the answer any more: stop it within a layer, or take it out of the line."""
        job.cancel.set()
        if job.task is not None and job is not self.current:
            job.task.cancel()

    async def _serve(self, job: Job, place: Place) -> None:
        loop = asyncio.get_running_loop()
        try:
            await place.turn()
            self.current = job
            await loop.run_in_executor(self._thread, self._run, job, loop)
        finally:
            if self.current is job:
                self.current = None
            place.leave()
            self._finished(job)
            job.steps.put_nowait(None)

    def _run(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        try:
            if not job.cancel.is_set():
                for step in self._steps(job):
                    job.reply.add(step)
                    if step.finish_reason is not None:
                        self._close(job)
                    loop.call_soon_threadsafe(job.steps.put_nowait, step)
        except BaseException as error:  # whatever it is, it is the client's to hear of
            loop.call_soon_threadsafe(job.steps.put_nowait, error)

    def _steps(self, job: Job):  # type: ignore[no-untyped-def]
        ask = job.ask
        return self.engine.stream(
            ask.text or "" if ask.messages is None else ask.messages,
            tokens=job.tokens,
            sampling=ask.sampling,
            max_tokens=ask.max_tokens,
            stop=ask.stop,
            think_budget=ask.think_budget,
            tools=ask.tools,
            logprobs=ask.logprobs,
            cancel=job.cancel,
            progress=job.read,
        )

    def _close(self, job: Job) -> None:
        """What is to be known of an answer that is complete."""
        text = self.engine.decode(job.reply.tokens)
        found = [(text.find(stop), stop) for stop in job.ask.stop if stop in text]
        job.stop_text = min(found)[1] if found else None
        if job.ask.messages is not None and job.reply.finish_reason in ("stop", "tool_calls", "length"):
            end = self.engine.decode(job.tokens[-END_TOKENS:])[-LONGEST_OPENING:]
            thinking = end.rstrip().endswith("<think>")
            self.turns.remember(
                job.ask.messages, end, job.reply, parse_message(text, job.ask.tools, thinking)
            )

    @property
    def stats(self) -> Stats | None:
        """The figures of the answer being made."""
        return self.current.reply.stats if self.current else None

    async def close(self) -> None:
        """Stop what is being answered and what waits, and wait for the thread."""
        if self.current is not None:
            self.current.cancel.set()
        waiting = [task for task in self._tasks if self.current is None or task is not self.current.task]
        for task in waiting:
            task.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
