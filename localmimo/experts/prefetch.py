"""PrefetchGate: whether guessing the next layer's pages pays. Pure; knows counts and seconds, no pages.

Two questions, asked all the time. Are most guesses right? And are steps with guesses faster than steps without? The
second is measured in blocks of steps, with, without, without, with, so that a drift (a cache that fills) does not look
like a gain; then the faster way is kept, and compared again after ever longer pauses. The automatic choice is therefore
never much slower than leaving guesses out.
"""

import time
from collections.abc import Callable

BLOCK = 8  # steps that are measured together
TRIAL = (True, False, False, True)  # blocks of a comparison: with guesses or without
PAUSES = (32, 256)  # blocks until the next comparison: at first, and at most
WINDOW = 256  # guesses that the share of right ones is taken over
IDLE_S = 2.0  # a longer time between two layers is a pause between answers
LEAST_USEFUL = 0.5  # share of right guesses below which none are made


class PrefetchGate:
    """Opens and closes as the measurements say."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._useful = self._wasted = 0.0
        self._wanted = True
        self._blocks = (
            -1
        )  # of the comparison or the pause; the very first block is not counted: the cache is cold
        self._pause = PAUSES[0]
        self._seconds = {True: 0.0, False: 0.0}  # of the comparison under way
        self._steps = 0
        self._missed = False  # whether anything was read from disk in the running block
        self._began = self._last = clock()
        self._layer = -1

    @property
    def open(self) -> bool:
        """Whether guesses are wanted now."""
        return self._guessing and self._missed and self.useful_share >= LEAST_USEFUL

    @property
    def _guessing(self) -> bool:
        """What the running block does."""
        return TRIAL[max(0, self._blocks)] if self._blocks < len(TRIAL) else self._wanted

    @property
    def useful_share(self) -> float:
        """Share of right guesses, lately; 1 before there are any."""
        n = self._useful + self._wasted
        return self._useful / n if n >= BLOCK else 1.0

    def judge(self, useful: int, wasted: int) -> None:
        """So many guesses for a layer were right, so many were read for nothing."""
        keep = max(0.0, 1 - (useful + wasted) / WINDOW)
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
                self._end_block(now)
        self._layer = layer

    def _end_block(self, now: float) -> None:
        if self._missed:  # steps without a miss say nothing about guesses
            if 0 <= self._blocks < len(TRIAL):
                self._seconds[self._guessing] += now - self._began
            self._blocks += 1
            self._turn()
        self._began, self._steps, self._missed = now, 0, False

    def _turn(self) -> None:
        """At the end of a comparison keep the faster way; at the end of a pause compare again."""
        if self._blocks == len(TRIAL):
            wanted = self._seconds[True] < self._seconds[False]
            self._pause = min(2 * self._pause, PAUSES[1]) if wanted == self._wanted else PAUSES[0]
            self._wanted = wanted
        elif self._blocks == len(TRIAL) + self._pause:
            self._blocks = 0
            self._seconds = {True: 0.0, False: 0.0}
            self._useful = self._wasted = 0.0  # a new try is judged by its own guesses
