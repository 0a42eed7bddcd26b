"""A/B timing: two ways of doing the same, compared in turns, by the ratios of neighbouring measurements.

A machine that is now faster, now slower, changes no such ratio much, and its median takes no notice of a stall. Pure;
knows seconds, not what took them.
"""

from collections import deque
from statistics import median


class ABTiming:
    """The second way's seconds over the first's."""

    def __init__(self) -> None:
        self.ratios: list[float] = []
        self._last: deque[tuple[bool, float]] = deque(maxlen=3)

    @property
    def second(self) -> bool:
        """Whether it is the second way's turn."""
        return bool(self._last) and not self._last[-1][0]

    @property
    def ratio(self) -> float:
        """The median of the ratios; there must be one."""
        return median(self.ratios)

    def note(self, seconds: float) -> None:
        """The way whose turn it was took so long."""
        self._last.append((self.second, seconds))
        if len(self._last) == 3:
            (_, before), (second, here), (_, after) = self._last
            ratio = here / (before * after) ** 0.5
            self.ratios.append(ratio if second else 1 / ratio)
