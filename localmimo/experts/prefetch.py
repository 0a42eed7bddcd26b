"""PrefetchGate: whether guessing the next layer's pages pays. Pure; knows counts and seconds, no pages.

Two questions, asked all the time. Are most guesses right? And are steps with guesses faster than steps without? The
second is measured, a few steps with and a few without in turn, so that the automatic choice is never much slower than
leaving guesses out.
"""

import time
from collections.abc import Callable

BLOCK = 8  # steps that are measured together
PAUSE = 16  # blocks between two comparisons once the choice is made
WINDOW = 256  # guesses that the share of right ones is taken over
IDLE_S = 2.0  # a longer time between two layers is a pause between answers
LEAST_USEFUL = 0.5  # share of right guesses below which none are made


class PrefetchGate:
    """Opens and closes as the measurements say."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._useful = self._wasted = 0.0
        self._seconds: dict[bool, float | None] = {
            True: None,
            False: None,
        }  # per step, with and without guesses
        self._wanted = True
        self._trying = True  # what the running block does
        self._blocks = 0
        self._steps = 0
        self._missed = False  # whether anything was read from disk in the running block
        self._began = self._last = clock()
        self._layer = -1

    @property
    def open(self) -> bool:
        """Whether guesses are wanted now."""
        return self._trying and self._missed and self.useful_share >= LEAST_USEFUL

    @property
    def useful_share(self) -> float:
        """Share of right guesses, lately; 1 before there are any."""
        n = self._useful + self._wasted
        return self._useful / n if n >= BLOCK else 1.0

    def judge(self, useful: int, wasted: int) -> None:
        """So many guesses for a layer were right, so many were read for nothing."""
        keep = 1 - (useful + wasted) / WINDOW
        self._useful = self._useful * keep + useful
        self._wasted = self._wasted * keep + wasted

    def step(self, layer: int, missing: bool) -> None:
        """A layer asks for its pages; layers come in ascending order within a step."""
        now = self._clock()
        if now - self._last > IDLE_S:  # nobody was asking: what is measured begins anew
            self._began, self._steps = now, 0
        self._last = now
        self._missed |= missing
        if layer <= self._layer:
            self._steps += 1
            if self._steps == BLOCK:
                self._end_block()
        self._layer = layer

    def _end_block(self) -> None:
        now = self._clock()
        if self._missed:
            self._remember(self._trying, (now - self._began) / BLOCK)
            self._blocks += 1
            self._choose()
        self._began, self._steps, self._missed = now, 0, False

    def _remember(self, guessing: bool, seconds: float) -> None:
        before = self._seconds[guessing]
        self._seconds[guessing] = seconds if before is None else (before + seconds) / 2

    def _choose(self) -> None:
        with_guesses, without = self._seconds[True], self._seconds[False]
        if with_guesses is not None and without is not None:
            self._wanted = with_guesses <= without
        comparing = with_guesses is None or without is None or self._blocks % PAUSE == 0
        self._trying = not self._trying if comparing else self._wanted
        if self._trying and not self._wanted:
            self._useful = self._wasted = 0.0  # a new try is judged by its own guesses
