"""Runs the routed experts of a layer on the CPU: tokens grouped by expert, a weighted sum.

Owns no page. The outputs of a token are added in ascending order of its experts, whatever the order in which the
pages come: where a page was, and when it came, never changes the answer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from localmimo.experts.store.store import ExpertStore
from localmimo.experts.tiers.ram_slots import Arrival
from localmimo.limits import EXPERT_ROWS, STEP_TOKENS, TAIL_TOKENS
from localmimo.model.protocols import PredictNext
from quant.ops.experts import experts as run_pages
from quant.ops.experts import in_order

Record = Callable[[int, Tensor], None]  # layer, chosen experts [n, k]


class ExpertRunner:
    """Runs experts from a store."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self.record: Record | None = None  # told of every choice while it is set

    def run(
        self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor, predict_next: PredictNext | None = None
    ) -> Tensor:
        """x [n, hidden], chosen experts int64 [n, k] ascending, weights float32 [n, k] -> float32 [n, hidden].

        `predict_next` is called only where the store prefetches for the next layer.
        """
        if self.record is not None:
            self.record(layer, chosen)
        if len(x) > STEP_TOKENS:
            return self._run_prompt(layer, x.contiguous(), chosen, weights)
        return self._run_step(layer, x.contiguous(), chosen, weights, predict_next)

    def _run_step(
        self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor, predict_next: PredictNext | None
    ) -> Tensor:
        """Pages as they come; every output has a row of its own until all are there."""
        places, spans = grouped(chosen)
        outputs, weights = torch.empty(chosen.numel(), x.shape[1]), weights.contiguous()
        for i, arrivals in enumerate(self._store.fetch(layer, list(spans))):
            if i == 0:
                self._prefetch(predict_next)
            for group in by_layout(arrivals):
                edges = [edge for arrival in group for edge in spans[arrival.expert]]
                pages = [arrival.page for arrival in group]
                run_pages(x, group[0].layout, pages, places, edges, weights, outputs)
        return in_order(outputs.view(*chosen.shape, -1))

    def shrink(self) -> bool:
        """There is no GPU whose memory could be given back."""
        return False

    def _prefetch(self, predict_next: PredictNext | None) -> None:
        if predict_next is None or not self._store.prefetching:
            return
        layer, chosen = predict_next()
        self._store.prefetch(layer, chosen.unique().tolist())  # type: ignore[no-untyped-call]

    def _run_prompt(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Pages in file order, their outputs added as they come: ascending experts, no row for every choice."""
        self._store.note_prompt(layer, chosen[-TAIL_TOKENS:].tolist())
        places, spans = grouped(chosen)
        tokens, shares = places // chosen.shape[1], weights.reshape(-1, 1)[places]
        total = torch.zeros(len(x), x.shape[1])
        for arrivals in self._store.stream(layer, list(spans)):
            for group in _groups(arrivals, spans):
                _add_group(x, group, tokens, shares, total)
        return total


PageRows = tuple[Arrival, int, int]  # an expert's page, and the places, start to stop, that it works on


def _add_group(x: Tensor, group: Sequence[PageRows], tokens: Tensor, shares: Tensor, total: Tensor) -> None:
    """Run a few experts of one layout, in order, and add their outputs to total [n, hidden]."""
    rows = [slice(start, stop) for _, start, stop in group]
    own = torch.cat([tokens[row] for row in rows])
    sizes = [stop - start for _, start, stop in group]
    ends = list(accumulate(sizes))
    edges = [edge for size, end in zip(sizes, ends, strict=True) for edge in (end - size, end)]
    outputs = torch.empty(len(own), x.shape[1])
    pages, weights = [arrival.page for arrival, _, _ in group], torch.cat([shares[row] for row in rows])
    run_pages(x[own], group[0][0].layout, pages, torch.arange(len(own)), edges, weights, outputs)
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        total.index_add_(0, own[start:end], outputs[start:end])


def grouped(chosen: Tensor) -> tuple[Tensor, dict[int, tuple[int, int]]]:
    """Places in chosen [n, k], ascending in every row, sorted by expert, and expert -> its start and stop in them.

    Experts ascend. A place is the number of an entry: token * k + its number in the row.
    """
    if len(chosen) <= STEP_TOKENS:
        return _few_grouped(chosen.reshape(-1).tolist())
    experts, counts = chosen.unique(return_counts=True)  # type: ignore[no-untyped-call]
    stops = counts.cumsum(0).tolist()
    return chosen.reshape(-1).argsort(stable=True), dict(
        zip(experts.tolist(), zip([0, *stops], stops, strict=False), strict=True)
    )


def _few_grouped(chosen: list[int]) -> tuple[Tensor, dict[int, tuple[int, int]]]:
    """`grouped` of a step's choices: for so few of them torch takes longer than Python."""
    places = sorted(range(len(chosen)), key=chosen.__getitem__)
    spans: dict[int, tuple[int, int]] = {}
    for i, place in enumerate(places):
        expert = chosen[place]
        spans[expert] = spans.get(expert, (i,))[0], i + 1
    return torch.tensor(places), spans


def by_layout(arrivals: Sequence[Arrival]) -> Iterator[Sequence[Arrival]]:
    """The arrivals, those of one layout together."""
    if all(arrival.layout is arrivals[0].layout for arrival in arrivals):
        yield from (arrivals,) if arrivals else ()
        return
    for layout in {arrival.layout for arrival in arrivals}:
        yield [arrival for arrival in arrivals if arrival.layout == layout]


def _groups(arrivals: Sequence[Arrival], spans: Mapping[int, tuple[int, int]]) -> Iterator[list[PageRows]]:
    """Consecutive pages of one layout with at most EXPERT_ROWS rows together, and long pages in pieces."""
    group: list[PageRows] = []
    for arrival in arrivals:
        start, stop = spans[arrival.expert]
        for at in range(start, stop, EXPERT_ROWS):
            piece = arrival, at, min(stop, at + EXPERT_ROWS)
            if group and not _fits(group, piece):
                yield group
                group = []
            group.append(piece)
    yield group


def _fits(group: Sequence[PageRows], piece: PageRows) -> bool:
    rows = sum(stop - start for _, start, stop in (*group, piece))
    return rows <= EXPERT_ROWS and group[0][0].layout == piece[0].layout
