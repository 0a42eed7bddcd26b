"""Prefetch gate: whether prefetching the next layer's pages pays. Pure; knows counts and seconds, no pages.

Two questions, asked all the time. Are most guesses right? And are steps with guesses faster than steps without? The
second is asked of two steps without, two with, in turns; then the faster way is kept, and compared again after ever
longer pauses. The automatic choice is therefore never much slower than leaving guesses out.
"""

import time
from collections.abc import Callable

from localmimo.hardware.ab_timing import ABTiming

BLOCK = 2  # steps that are measured together
RATIOS = 9  # for a verdict
PAUSES = (128, 1024)  # blocks until the next comparison: at first, and at most
ENOUGH = 8  # guesses before anything is said of them
WINDOW = 256  # guesses that the share of right ones is taken over
IDLE_S = 2.0  # a longer time between two layers is a pause between answers
LEAST_USEFUL = 0.5  # share of right guesses below which none are made


class PrefetchGate:
    """Opens and closes as the measurements say."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._useful = self._wasted = 0.0
        self._wanted = True
        self._paired: ABTiming | None = None  # without guesses and with them, while they are compared
        self._pause = PAUSES[0]
        self._left = 1  # blocks of the pause; the very first block is not compared: the cache is cold
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
        return self._wanted if self._paired is None else self._paired.second

    @property
    def useful_share(self) -> float:
        """Share of right guesses, lately; 1 before there are any."""
        n = self._useful + self._wasted
        return self._useful / n if n >= ENOUGH else 1.0

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
            self._rest() if self._paired is None else self._compare(self._paired, now - self._began)
        self._began, self._steps, self._missed = now, 0, False

    def _rest(self) -> None:
        """At the end of a pause compare again."""
        self._left -= 1
        if not self._left:
            self._paired = ABTiming()
            self._useful = self._wasted = 0.0  # a new try is judged by its own guesses

    def _compare(self, paired: ABTiming, seconds: float) -> None:
        """At the end of a comparison keep the faster way."""
        paired.note(seconds)
        if len(paired.ratios) == RATIOS:
            wanted = paired.ratio < 1
            self._pause = min(2 * self._pause, PAUSES[1]) if wanted == self._wanted else PAUSES[0]
            self._wanted, self._left, self._paired = wanted, self._pause, None
