"""Policies: which page is evicted. Pure decisions over pages; knows no bytes, no torch, no disk.

A policy hears what is asked for (`request`), what is held (`admit`, `drop`), and names who should go (`victims`). The
store and `localmimo replay` drive the same objects.
"""

from collections.abc import Collection, Sequence
from heapq import heappop, heappush
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localmimo.experts.policy.adaptive import Adaptive
from localmimo.experts.policy.router_stats import Page

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

    def __init__(self, future: NDArray[np.int64], n_experts: int) -> None:
        """future: every page that will be requested, in order, as layer * n_experts + expert."""
        self._next_of = next_uses(future)
        self._n_experts = n_experts
        self._now = 0
        self._next: dict[int, int] = {}  # of every page requested so far
        self._held: set[int] = set()
        self._farthest: list[tuple[int, int]] = []  # a heap of (-next use, page); stale entries are skipped

    def _key(self, page: Page) -> int:
        return page[0] * self._n_experts + page[1]

    def request(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            key = self._key((layer, expert))
            self._next[key] = int(self._next_of[self._now])
            self._now += 1
            if key in self._held:
                heappush(self._farthest, (-self._next[key], key))

    def admit(self, page: Page) -> None:
        key = self._key(page)
        self._held.add(key)
        heappush(self._farthest, (-self._next[key], key))

    def drop(self, page: Page) -> None:
        self._held.discard(self._key(page))

    def victims(self, n: int, keep: Collection[Page]) -> list[Page]:
        found: dict[int, Page] = {}
        passed = []
        while self._farthest and len(found) < n:
            entry = heappop(self._farthest)
            key = entry[1]
            if key in found or key not in self._held or -entry[0] != self._next[key]:
                continue
            passed.append(entry)
            page = divmod(key, self._n_experts)
            if page not in keep:
                found[key] = page
        for entry in passed:
            heappush(self._farthest, entry)
        return list(found.values())


def next_uses(future: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each request, the place of the next one for the same page; len(future) where there is none."""
    order = np.argsort(future, kind="stable")
    same = future[order[1:]] == future[order[:-1]]
    places = np.full(len(future), len(future), dtype=np.int64)
    places[order[:-1][same]] = order[1:][same]
    return places
