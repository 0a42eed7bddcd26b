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
        places, spans = grouped(chosen)
        outputs = torch.empty(chosen.numel(), x.shape[1])
        x, weights = x.contiguous(), weights.contiguous()
        for arrivals in self._store.fetch(layer, list(spans)):
            for layout in {arrival.layout for arrival in arrivals}:
                here = [arrival for arrival in arrivals if arrival.layout == layout]
                edges = [edge for arrival in here for edge in spans[arrival.expert]]
                run_pages(x, layout, [arrival.page for arrival in here], places, edges, weights, outputs)
        return outputs.view(*chosen.shape, -1).sum(1)


def grouped(chosen: Tensor) -> tuple[Tensor, dict[int, tuple[int, int]]]:
    """Places in chosen [n, k], ascending in every row, sorted by expert, and expert -> its start and stop in them.

    Experts ascend. A place is the number of an entry: token * k + its number in the row.
    """
    if len(chosen) == 1:
        return torch.arange(chosen.numel()), {e: (i, i + 1) for i, e in enumerate(chosen[0].tolist())}
    experts, counts = chosen.unique(return_counts=True)
    stops = counts.cumsum(0).tolist()
    return chosen.reshape(-1).argsort(stable=True), dict(
        zip(experts.tolist(), zip([0, *stops], stops, strict=False), strict=True)
    )
