"""Referee: what LRU would have found with as many slots, and whether to do as it does for a while. Pure.

A forecast can be wrong for long where traffic changes all at once. Once ours has found a part of a token's pages fewer
than LRU, LRU has its way for a while; each next while is twice as long.
"""

from collections import OrderedDict
from collections.abc import Sequence

PATIENCE = 0.5  # token cycles of pages that ours may be behind
LEAST_PATIENCE = 40  # pages: small models have small cycles, and luck
FIRST_REST, LONGEST_REST = 8, 1024  # tokens that LRU has its way


class Referee:
    """Plays LRU along, by places of pages."""

    def __init__(self) -> None:
        self._lru: OrderedDict[int, None] = OrderedDict()
        self._n_requests = self._ours = self._theirs = 0  # of the present token
        self._behind = 0.0
        self._rest, self._next_rest = 0, FIRST_REST

    @property
    def lru_rules(self) -> bool:
        return self._rest > 0

    def request(self, places: Sequence[int], n_found: int, n_slots: int) -> None:
        """These pages are asked for, n_found of them held here, in n_slots slots."""
        self._n_requests += len(places)
        self._ours += n_found
        for place in places:
            self._theirs += place in self._lru
            self._lru[place] = None
            self._lru.move_to_end(place)
        while len(self._lru) > n_slots:
            self._lru.popitem(last=False)

    def next_token(self) -> None:
        if self._rest:
            self._rest -= 1
        else:
            self._behind = max(0.0, self._behind + self._theirs - self._ours)
            if self._behind > max(PATIENCE * self._n_requests, LEAST_PATIENCE):
                self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)
                self._behind = 0.0
        self._n_requests = self._ours = self._theirs = 0
