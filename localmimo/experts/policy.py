"""Policy: which page gives way. Pure decisions over pages; knows no bytes, no torch, no disk.

A policy hears what is asked for (`request`), what is held (`admit`, `drop`), and names who should go (`victims`). The
store and `localmimo replay` drive the same objects.
"""

from collections.abc import Collection, Sequence
from heapq import heappop, heappush
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localmimo.experts.stats import Page, RouterStats

__all__ = ["Adaptive", "Belady", "Lfu", "Lru", "Page", "Policy"]


class Policy(Protocol):
    """Who gives way. Layers are numbered as in the model: a dense layer simply never occurs."""

    def request(self, layer: int, experts: Sequence[int]) -> None:
        """These pages of one layer are asked for now, by one decode step."""

    def admit(self, page: Page) -> None:
        """`page` is now held in a slot, read on demand or by a guess."""

    def drop(self, page: Page) -> None:
        """`page` is no longer held."""

    def victims(self, n: int, keep: Collection[Page]) -> list[Page]:
        """Up to n held pages that should give way, best first, none of `keep`. They are still held until dropped."""


class Lru:
    """The page that was not asked for (nor read in) for the longest time gives way."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._asked = np.full((n_layers, n_experts), -1, dtype=np.int64)  # when, for every page
        self._age = np.full((n_layers, n_experts), NEVER, dtype=np.int64)  # the same, for held pages
        self._clock = 0

    def request(self, layer: int, experts: Sequence[int]) -> None:
        held = self._age[layer]
        for expert in experts:
            self._clock += 1
            self._asked[layer, expert] = self._clock
            if held[expert] != NEVER:
                held[expert] = self._clock

    def admit(self, page: Page) -> None:
        if self._asked[page] < 0:  # a guess that nobody asked for yet
            self._clock += 1
            self._asked[page] = self._clock
        self._age[page] = self._asked[page]

    def drop(self, page: Page) -> None:
        self._age[page] = NEVER

    def victims(self, n: int, keep: Collection[Page]) -> list[Page]:
        return lowest(self._age, NEVER, n, keep)


NEVER = np.iinfo(np.int64).max


def lowest(ranks: NDArray[np.int64], absent: int, n: int, keep: Collection[Page]) -> list[Page]:
    """Up to n pages of the lowest rank, lowest first, none of `keep` and none whose rank is `absent`."""
    flat, width = ranks.reshape(-1), ranks.shape[1]
    n_candidates = min(n + len(keep), flat.size)
    if n_candidates == 1:
        order = np.array([flat.argmin()])
    else:
        part = flat.argpartition(n_candidates - 1)[:n_candidates]
        order = part[flat[part].argsort(kind="stable")]
    pages = (divmod(int(place), width) for place in order if flat[place] != absent)
    return [page for page in pages if page not in keep][:n]


class Adaptive:
    """The page whose next use is expected to be farthest away gives way.

    A page of layer l waits until l comes round again, and then (1 - p) / p tokens more, p being its chance
    per token.
    Times are absolute, in layers since the start, so that a layer's figures change only when it is asked for.
    """

    def __init__(self, stats: RouterStats) -> None:
        self._stats = stats
        self._n_rows = len(stats.layers)
        shape = (self._n_rows, stats.n_experts)
        self._due = np.zeros(shape, dtype=np.float64)  # when each page is expected to be used next
        self._held_due = np.full(shape, -np.inf, dtype=np.float64)  # the same, for held pages
        self._latest = np.full(self._n_rows, -np.inf, dtype=np.float64)  # of the held pages of each row
        self._held = np.zeros(shape, dtype=bool)
        self._token, self._row = 0, -1
        for row in range(self._n_rows):
            self._expect(row)

    def request(self, layer: int, experts: Sequence[int]) -> None:
        self._stats.request(layer, experts)
        row = self._stats.row[layer]
        if row <= self._row:
            self._token += 1
        self._row = row
        self._expect(row)

    def _expect(self, row: int) -> None:
        """Work out when the pages of a row are due."""
        stats = self._stats
        views = stats.use[:, row] / np.maximum(stats.seen[:, row], 1e-9)[:, None]
        chance = np.maximum(views.mean(0), 1e-4)
        next_turn = (self._token + (row <= self._row)) * self._n_rows + row
        self._due[row] = next_turn + self._n_rows * (1 / chance - 1)
        self._held_due[row] = np.where(self._held[row], self._due[row], -np.inf)
        self._latest[row] = self._held_due[row].max()

    def admit(self, page: Page) -> None:
        row, expert = self._stats.row[page[0]], page[1]
        self._held[row, expert] = True
        self._set(row, expert, self._due[row, expert])

    def drop(self, page: Page) -> None:
        row, expert = self._stats.row[page[0]], page[1]
        self._held[row, expert] = False
        self._set(row, expert, np.float64(-np.inf))

    def _set(self, row: int, expert: int, due: np.float64) -> None:
        self._held_due[row, expert] = due
        self._latest[row] = self._held_due[row].max()

    def victims(self, n: int, keep: Collection[Page]) -> list[Page]:
        chosen: list[Page] = []
        passed: list[tuple[int, int, np.float64]] = []
        while len(chosen) < n:
            row = int(self._latest.argmax())
            if self._latest[row] == -np.inf:
                break
            expert = int(self._held_due[row].argmax())
            passed.append((row, expert, self._held_due[row, expert]))
            self._set(row, expert, np.float64(-np.inf))
            page = (self._stats.layers[row], expert)
            if page not in keep:
                chosen.append(page)
        for row, expert, due in passed:
            self._set(row, expert, due)
        return chosen


class Lfu:
    """The page that was asked for least often so far gives way; among equals, the least recently asked for."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._asked = np.zeros((n_layers, n_experts), dtype=np.int64)
        self._rank = np.full(
            (n_layers, n_experts), NEVER, dtype=np.int64
        )  # of held pages: how often, then when
        self._clock = 0

    def request(self, layer: int, experts: Sequence[int]) -> None:
        held = self._rank[layer]
        for expert in experts:
            self._clock += 1
            asked = self._asked[layer, expert] = (self._asked[layer, expert] >> 40) + 1 << 40 | self._clock
            if held[expert] != NEVER:
                held[expert] = asked

    def admit(self, page: Page) -> None:
        self._rank[page] = self._asked[page]

    def drop(self, page: Page) -> None:
        self._rank[page] = NEVER

    def victims(self, n: int, keep: Collection[Page]) -> list[Page]:
        return lowest(self._rank, NEVER, n, keep)


class Belady:
    """The page whose next request is farthest away gives way. It is told the future; what the best policy could do."""

    def __init__(self, future: Sequence[Page]) -> None:
        """future: every page that will be requested, in order."""
        self._next_of = next_uses(future)
        self._now = 0
        self._next: dict[Page, int] = {}  # of every page requested so far
        self._held: set[Page] = set()
        self._farthest: list[tuple[int, Page]] = []  # a heap of (-next use, page); stale entries are skipped

    def request(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            page = (layer, expert)
            self._next[page] = self._next_of[self._now]
            self._now += 1
            if page in self._held:
                heappush(self._farthest, (-self._next[page], page))

    def admit(self, page: Page) -> None:
        self._held.add(page)
        heappush(self._farthest, (-self._next[page], page))

    def drop(self, page: Page) -> None:
        self._held.discard(page)

    def victims(self, n: int, keep: Collection[Page]) -> list[Page]:
        found: dict[Page, int] = {}
        passed = []
        while self._farthest and len(found) < n:
            entry = heappop(self._farthest)
            page = entry[1]
            if page in found or page not in self._held or -entry[0] != self._next[page]:
                continue
            passed.append(entry)
            if page not in keep:
                found[page] = entry[0]
        for entry in passed:
            heappush(self._farthest, entry)
        return list(found)


def next_uses(future: Sequence[Page]) -> list[int]:
    """For each request, the place of the next one for the same page; len(future) where there is none."""
    later: dict[Page, int] = {}
    places = [0] * len(future)
    for place in range(len(future) - 1, -1, -1):
        places[place] = later.get(future[place], len(future))
        later[future[place]] = place
    return places
