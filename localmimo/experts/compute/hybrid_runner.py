"""HybridRunner: the routed experts of a layer where the rest of the model is on a GPU.

A step's experts are computed where their pages are: on the GPU, and on the CPU meanwhile. The pages of a long prompt
pass through the GPU. Owns no page. The outputs of a token are added in ascending order of its experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from localmimo.experts.compute.cpu_runner import ExpertRunner, Record, by_layout, grouped
from localmimo.experts.compute.gpu_experts import GpuExperts
from localmimo.experts.compute.host_transfer import HostTransfer
from localmimo.experts.compute.page_staging import PageStaging
from localmimo.experts.store.store import ExpertStore
from localmimo.experts.tiers.ram_slots import Arrival
from localmimo.limits import EXPERT_ROWS, SHARED_TOKENS, STEP_TOKENS, TAIL_TOKENS
from localmimo.model.protocols import PredictNext
from quant import gpu
from quant.ops.experts import experts as run_pages
from quant.ops.experts import in_order, run_expert


def runner_of(store: ExpertStore, slot_bytes: int, gpu: torch.device | None) -> "ExpertRunner | HybridRunner":
    """Who runs a store's experts, on the CPU alone or beside a GPU."""
    return ExpertRunner(store) if gpu is None else HybridRunner(store, slot_bytes, gpu)


class HybridRunner:
    """Runs experts from a store, for hidden states on `device`."""

    def __init__(self, store: ExpertStore, slot_bytes: int, device: torch.device) -> None:
        self._store = store
        self._gpu = None if store.gpu is None else GpuExperts(store.gpu)
        self._transfer = HostTransfer(device)
        self._staging = PageStaging(slot_bytes, device)
        self.record: Record | None = None  # told of every choice while it is set

    def run(
        self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor, predict_next: PredictNext | None = None
    ) -> Tensor:
        """x [n, hidden], chosen experts int64 [n, k] ascending, weights float32 [n, k] -> float32 [n, hidden].

        All of them are on the device. `predict_next` is called only where the store prefetches for the next layer.
        """
        if self.record is not None:
            self.record(layer, chosen.cpu())
        with self._store.lock:
            if len(x) > SHARED_TOKENS:
                return self._pass_through(layer, x, chosen, weights)
            if len(x) <= STEP_TOKENS:
                self._store.begin_layer(layer)
            rows = self._rows(layer, x.contiguous(), chosen, weights, predict_next)
            return gpu.combine(rows) if rows.is_cuda else in_order(rows)

    # ---- for steps that run from CUDA graphs (decode/cuda_graphs.py) ----

    @property
    def lock(self) -> AbstractContextManager[object]:
        """While it is held no page moves but in `begin_step`."""
        return self._store.lock

    @property
    def generation(self) -> int:
        """Another number as soon as the pages on the device are at other addresses."""
        return 0 if self._store.gpu is None else self._store.gpu.generation

    @property
    def has_observer(self) -> bool:
        """Whether every choice is reported."""
        return self.record is not None

    def begin_step(self) -> None:
        """Let pages move, and count what was noted."""
        self._store.begin_layer(-1)
        if self._store.gpu is not None:
            self._store.gpu.order()

    def is_resident(self, layer: int) -> bool:
        """Whether every expert of a layer is on the device, and a kernel finds it there."""
        return self._gpu is not None and self._gpu.by_kernel and self._has_all(layer)

    def _has_all(self, layer: int) -> bool:
        return self._store.gpu is not None and self._store.gpu.has_all(layer)

    def run_resident(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`run` where all are there; the host does nothing but launch."""
        assert self._gpu is not None
        return gpu.combine(self._gpu.begin_ordered(layer, x.contiguous(), chosen, weights))

    def note(self, layer: int, chosen: Tensor) -> None:
        """A step's choice [n, k] of a layer run so, good until the next step."""
        self._store.deferred.note(layer, chosen)

    # ---- memory ----

    def shrink(self) -> bool:
        """Give some of the device's memory back; False where there is none to give."""
        with self._store.lock:
            return self._store.gpu is not None and self._store.gpu.shrink()

    # ---- steps and short prompts: every output has a row of its own ----

    def _rows(
        self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor, predict_next: PredictNext | None
    ) -> Tensor:
        """Weighted outputs [n, k, hidden] on the device."""
        step = len(x) <= STEP_TOKENS
        if step and self._gpu is not None and self._has_all(layer):  # neither side waits for the other
            self._store.deferred.note(layer, chosen)
            return self._gpu.begin(layer, x, chosen, weights)
        ahead = predict_next() if predict_next is not None and self._store.prefetching else None
        on_host = self._transfer.down(x, chosen, weights, *(() if ahead is None else ahead[1:]))
        on_gpu = None if self._gpu is None else self._gpu.begin(layer, x, chosen, weights)
        places, spans = grouped(on_host[1])
        if step:
            arriving = self._store.fetch(layer, list(spans))
        else:
            self._store.note_prompt(layer, on_host[1][-TAIL_TOKENS:].tolist())
            arriving = self._store.stream(layer, self._store.without_gpu(layer, list(spans)))
        outputs = self._transfer.buffer(-1, torch.Size((chosen.numel(), x.shape[1])), torch.float32).zero_()
        computed = False
        for i, arrivals in enumerate(arriving):
            if i == 0 and ahead is not None:
                self._store.prefetch(ahead[0], on_host[3].unique().tolist())  # type: ignore[no-untyped-call]
            computed |= bool(arrivals)
            _compute(arrivals, on_host[0], places, spans, on_host[2], outputs)
        if on_gpu is not None and not computed:
            return on_gpu
        rows = self._transfer.up(outputs).view(*chosen.shape, -1)
        return rows if on_gpu is None else rows + on_gpu

    # ---- long prompts: pages in file order through the device ----

    def _pass_through(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Outputs added as their pages come: ascending experts, no row for every choice."""
        self._store.note_prompt(layer, chosen[-TAIL_TOKENS:].tolist())
        places, spans = grouped(chosen)
        tokens, shares = places // chosen.shape[1], weights.reshape(-1, 1)[places]
        total = torch.zeros(x.shape, device=x.device)
        for arrivals in self._store.stream(layer, list(spans)):
            pages = self._staging.through(arrival.page for arrival in arrivals)
            for arrival, page in zip(arrivals, pages, strict=True):
                expert = arrival.layout.expert(page)
                for rows in _pieces(*spans[arrival.expert]):
                    own = tokens[rows]
                    total.index_add_(0, own, run_expert(expert, x[own]).float() * shares[rows])
        return total


def _compute(
    arrivals: Sequence[Arrival],
    x: Tensor,
    places: Tensor,
    spans: dict[int, tuple[int, int]],
    weights: Tensor,
    outputs: Tensor,
) -> None:
    """Pages that have come, on the CPU: each output into its own row."""
    for group in by_layout(arrivals):
        edges = [edge for arrival in group for edge in spans[arrival.expert]]
        run_pages(x, group[0].layout, [arrival.page for arrival in group], places, edges, weights, outputs)


def _pieces(start: int, stop: int) -> Iterator[slice]:
    return (slice(at, min(stop, at + EXPERT_ROWS)) for at in range(start, stop, EXPERT_ROWS))
