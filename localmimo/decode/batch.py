"""Batch: several generations that go on in step, one token each per pass, so that they share what a pass reads.

Knows sessions and generations; nothing of prompts' text, of budgets or of threads. Each generation says what it would
have said alone: its session, its random numbers and its stop rules are its own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from localmimo.decode.generation import Generation
from localmimo.decode.session import Session, step_together
from localmimo.decode.steps import Step
from localmimo.errors import Cancelled

Start = Callable[[int, Session], Generation]  # prompt number and its session


@dataclass(slots=True)
class Batch:
    """Prompts of tokens, and as many sessions as may go on at the same time."""

    prompts: Sequence[Sequence[int]]
    sessions: Sequence[Session]
    start: Start

    def run(self) -> Iterator[tuple[int, Step]]:
        """Yield (prompt number, step) as they come; the prompts begin in order, as sessions become free."""
        waiting, free = deque(range(len(self.prompts))), list(self.sessions)
        going: dict[int, Generation] = {}
        try:
            while waiting or going:
                while waiting and free:
                    yield from self._begin(waiting.popleft(), free, going)
                    yield from self._retire(going, free)
                if going:
                    yield from self._step(going)
                    yield from self._retire(going, free)
        finally:
            for generation in going.values():
                generation.session.checkpoint()

    def _begin(
        self, number: int, free: list[Session], going: dict[int, Generation]
    ) -> Iterator[tuple[int, Step]]:
        """Read a prompt in the session that holds most of it already."""
        prompt = self.prompts[number]
        session = max(free, key=lambda one: one.common(prompt))
        free.remove(session)
        going[number] = generation = self.start(number, session)
        try:
            logits = generation.begin(prompt)
        except Cancelled:
            generation.reason = "cancelled"
            return
        yield from self._take(number, generation, logits)

    def _step(self, going: dict[int, Generation]) -> Iterator[tuple[int, Step]]:
        """One more token of each."""
        generations = list(going.values())

        def check() -> None:
            for generation in generations:
                generation.check()

        try:
            logits = step_together(
                [one.session for one in generations], [one.token for one in generations], check
            )
        except Cancelled:
            for generation in generations:
                generation.reason = "cancelled"
            return
        for (number, generation), row in zip(going.items(), logits, strict=True):
            generation.stats.drafts.passes += 1
            yield from self._take(number, generation, row)

    @staticmethod
    def _take(number: int, generation: Generation, logits: Tensor) -> Iterator[tuple[int, Step]]:
        for step in generation.take(logits):
            yield number, step

    @staticmethod
    def _retire(going: dict[int, Generation], free: list[Session]) -> Iterator[tuple[int, Step]]:
        """End those that are over; their sessions are free."""
        for number in [number for number, generation in going.items() if generation.reason is not None]:
            generation = going.pop(number)
            generation.session.checkpoint()
            free.append(generation.session)
            for step in generation.end():
                yield number, step
