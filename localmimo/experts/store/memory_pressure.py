"""Memory pressure: gives slots back while the system is short of memory, and takes them again when it no longer is.

Knows free bytes and numbers of slots; not what lies in a slot. The budget was checked when the pack was opened; this is
for what other programs do afterwards.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

INTERVAL_S = 1.0
LOW_BYTES = 1 << 30  # free memory below which slots go
LOW_SHARE = 20  # or one part in so many of the machine's, whichever is less


class Resizable(Protocol):
    """What can shrink and grow: the store."""

    @property
    def n_slots(self) -> int: ...

    def resize(self, n_slots: int) -> None: ...


def low_bytes(ram_bytes: int) -> int:
    """Free memory below which slots are given back, on a machine with so much RAM."""
    return min(LOW_BYTES, ram_bytes // LOW_SHARE)


def slots_wanted(n_now: int, n_full: int, free_bytes: int, page_bytes: int, low: int) -> int:
    """How many slots to have: fewer below `low` free bytes, up to half as much again; more above twice as much.

    Between the two nothing changes, so that it does not swing. Growing goes in steps of a sixteenth.
    """
    if free_bytes < low:
        return max(1, n_now - -(-(low + low // 2 - free_bytes) // page_bytes))
    spare = (free_bytes - 2 * low) // page_bytes
    step = max(1, n_full // 16)
    return min(n_full, n_now + max(0, min(step, spare)))


class MemoryPressure:
    """Looks at the free memory every second, from a thread of its own."""

    def __init__(
        self,
        slots: Resizable,
        page_bytes: int,
        low: int,
        free_bytes: Callable[[], int],
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._slots = slots
        self._n_full = slots.n_slots
        self._page_bytes = page_bytes
        self._low = low
        self._free_bytes = free_bytes
        self._interval_s = interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-pressure", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(self._interval_s):
            with suppress(Exception):  # what can not be had or done now may be in a second: the watch goes on
                self._look()

    def _look(self) -> None:
        now = self._slots.n_slots
        wanted = slots_wanted(now, self._n_full, self._free_bytes(), self._page_bytes, self._low)
        if wanted != now:
            self._slots.resize(wanted)

    def close(self) -> None:
        """Stop looking."""
        self._over.set()
        self._thread.join()
