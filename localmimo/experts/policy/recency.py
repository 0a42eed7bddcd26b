"""Recency: the chance that a page is used, by how long it was not. Learnt from the requests, the same for all pages.

Knows rows, experts and how long ago each was used; not which page it is.
"""

import numpy as np
from numpy.typing import NDArray

from localmimo.experts.policy.router_stats import RouterStats

OLDEST = 256  # tokens; pages unused for longer, or never used, are alike
HALF_LIFE = 64  # tokens, of what was learnt
PRIOR = 4.0  # pages' worth of belief in the base chance
# 1, 2, 3 ... 8 tokens each have a bucket, then steps of about a quarter
EDGES = np.unique(np.concatenate((np.arange(1, 9), np.geomspace(9, OLDEST, 16).astype(np.intp))))
_BUCKET = np.searchsorted(EDGES, np.arange(OLDEST + 1), side="right")
N_BUCKETS = int(_BUCKET.max()) + 2  # the last one: never

Array = NDArray[np.float32]
Buckets = NDArray[np.intp]


class Recency:
    """Chances by age: at the next turn, and per token later on."""

    def __init__(self, stats: RouterStats) -> None:
        self._stats = stats
        self._seen = np.zeros((2, N_BUCKETS))  # pages of each age that could have been used: next, later
        self._used = np.zeros((2, N_BUCKETS))
        self._fade = 0.5 ** (1 / (HALF_LIFE * max(1, len(stats.layers))))  # a layer

    def buckets(self, rows: Buckets | slice = slice(None)) -> Buckets:
        """The age of every page of some rows at their next turn, as a bucket [rows, experts]."""
        last = self._stats.last_used[rows]
        ages = np.minimum(self._stats.steps[rows][:, None] - last, OLDEST)
        return np.where(last < 0, N_BUCKETS - 1, _BUCKET[ages])

    def learn(self, when: int, buckets: Buckets, used: Buckets) -> None:
        """Pages of these ages could have been used, and `used` of them were. when: 0 next turn, 1 later."""
        fade = self._fade ** len(buckets)
        self._seen[when] = self._seen[when] * fade + np.bincount(buckets.reshape(-1), minlength=N_BUCKETS)
        self._used[when] = self._used[when] * fade + np.bincount(used, minlength=N_BUCKETS)

    def chances(self, base_chance: float) -> Array:
        """Chance by bucket [next and later, buckets]."""
        return ((self._used + PRIOR * base_chance) / (self._seen + PRIOR)).astype(np.float32)
