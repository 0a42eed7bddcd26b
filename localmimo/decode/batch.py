"""Batch: several generations that advance together, one token each per pass, so that they share what a pass reads.

Knows sessions and generations; nothing of prompts' text, of budgets or of threads. Each generation gives what it would
give alone: its session, its random numbers and its stop rules are its own.
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
    """Prompts of tokens, and as many sessions as may run at the same time."""

    prompts: Sequence[Sequence[int]]
    sessions: Sequence[Session]
    start: Start

    def run(self) -> Iterator[tuple[int, Step]]:
        """Yield (prompt number, step) as they come; the prompts begin in order, as sessions become free."""
        waiting, free = deque(range(len(self.prompts))), list(self.sessions)
        active: dict[int, Generation] = {}
        try:
            while waiting or active:
                while waiting and free:
                    yield from self._begin(waiting.popleft(), free, active)
                    yield from self._retire(active, free)
                if active:
                    yield from self._step(active)
                    yield from self._retire(active, free)
        finally:
            for generation in active.values():
                generation.session.checkpoint()

    def _begin(
        self, number: int, free: list[Session], active: dict[int, Generation]
    ) -> Iterator[tuple[int, Step]]:
        """Read a prompt in the session that holds most of it already."""
        prompt = self.prompts[number]
        session = max(free, key=lambda session: session.common(prompt))
        free.remove(session)
        active[number] = generation = self.start(number, session)
        try:
            logits = generation.begin(prompt)
        except Cancelled:
            generation.reason = "cancelled"
            return
        yield from self._accept(number, generation, logits)

    def _step(self, active: dict[int, Generation]) -> Iterator[tuple[int, Step]]:
        """One more token of each."""
        generations = list(active.values())

        def check() -> None:
            for generation in generations:
                generation.check()

        try:
            logits = step_together(
                [generation.session for generation in generations],
                [generation.token for generation in generations],
                check,
            )
        except Cancelled:
            for generation in generations:
                generation.reason = "cancelled"
            return
        for (number, generation), row in zip(active.items(), logits, strict=True):
            generation.stats.drafts.passes += 1
            yield from self._accept(number, generation, row)

    @staticmethod
    def _accept(number: int, generation: Generation, logits: Tensor) -> Iterator[tuple[int, Step]]:
        for step in generation.take(logits):
            yield number, step

    @staticmethod
    def _retire(active: dict[int, Generation], free: list[Session]) -> Iterator[tuple[int, Step]]:
        """End those that are over; their sessions are free."""
        for number in [number for number, generation in active.items() if generation.reason is not None]:
            generation = active.pop(number)
            generation.session.checkpoint()
            free.append(generation.session)
            for step in generation.end():
                yield number, step
