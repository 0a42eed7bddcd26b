"""Runs the routed experts of a layer: tokens grouped by expert, each expert where its page lies, a weighted sum.

Owns nothing. Every output has a row of its own and the rows are summed in one fixed order at the end, so that where a
page lay, and when it came, never changes the answer.
"""

import torch
from torch import Tensor

from localmimo.experts.store import ExpertStore
from localmimo.model import Guess
from quant.ffn import experts as run_pages


class ExpertRunner:
    """Runs experts from a store."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store

    def run(
        self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor, guess: Guess | None = None
    ) -> Tensor:
        """x [n, hidden], chosen experts int64 [n, k] ascending, weights float32 [n, k] -> float32 [n, hidden]."""
        rows = group_by_expert(chosen)  # row = token * k + place
        outputs = torch.empty(chosen.numel(), x.shape[1])
        x, flat, k = x.contiguous(), weights.reshape(-1), chosen.shape[1]
        for arrivals in self._store.fetch(layer, list(rows)):
            for layout in {arrival.layout for arrival in arrivals}:
                pages = [arrival.page for arrival in arrivals if arrival.layout == layout]
                here = [rows[arrival.expert] for arrival in arrivals if arrival.layout == layout]
                tokens, shares = [row // k for row in here], [flat[row] for row in here]
                run_pages(x, layout, pages, tokens, shares, outputs, here)
        return outputs.view(*chosen.shape, -1).sum(1)


def group_by_expert(chosen: Tensor) -> dict[int, Tensor]:
    """Expert -> the flat places in chosen [n, k] where it stands, experts ascending."""
    order = chosen.reshape(-1).argsort(stable=True)
    experts, counts = chosen.unique(return_counts=True)
    return dict(zip(experts.tolist(), order.split(counts.tolist()), strict=True))
