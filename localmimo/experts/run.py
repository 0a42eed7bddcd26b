"""Runs the routed experts of a layer: tokens grouped by expert, each expert where its page lies, a weighted sum.

Owns nothing. The sum is taken in ascending order of experts whatever the order in which pages arrive, so that
where a page lay never changes the answer.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from localmimo.experts.store import ExpertStore
from quant import linear
from quant.page import Expert


class ExpertRunner:
    """Runs experts from a store."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store

    def run(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [n, hidden], chosen experts int64 [n, k], weights float32 [n, k] -> float32 [n, hidden]."""
        needed = chosen.unique().tolist()  # ascending
        total = OrderedSum(torch.zeros(x.shape, dtype=torch.float32), needed)
        for expert, page in self._store.fetch(layer, needed):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            y = run_expert(page, x[tokens]).float() * weights[tokens, place, None]
            total.add(expert, tokens, y)
        return total.result()


def run_expert(expert: Expert, x: Tensor) -> Tensor:
    """down(silu(gate x) * up x) of x [n, hidden], from packed weights."""
    return linear(F.silu(linear(x, expert.gate)) * linear(x, expert.up), expert.down)


class OrderedSum:
    """Adds contributions in the order of `keys`, keeping back those that come too early."""

    def __init__(self, total: Tensor, keys: list[int]) -> None:
        self._total = total
        self._keys = iter(keys)
        self._next = next(self._keys, None)
        self._early: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, key: int, rows: Tensor, values: Tensor) -> None:
        """values [len(rows), d] go to the rows of the total."""
        self._early[key] = (rows, values)
        while self._next in self._early:
            rows, values = self._early.pop(self._next)
            self._total.index_add_(0, rows, values)
            self._next = next(self._keys, None)

    def result(self) -> Tensor:
        """The sum; every key must have come."""
        assert not self._early and self._next is None
        return self._total
