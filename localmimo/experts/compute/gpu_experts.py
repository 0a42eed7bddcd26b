"""The experts whose pages are on the GPU: their products there, and what these save.

Knows pages on the device and tokens; not how a page gets there or which ones should.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from localmimo.experts.policy.promotion import Costs
from localmimo.experts.tiers.gpu_slots import GpuSlots
from localmimo.experts.tiers.tiers import GpuTier
from quant import gpu
from quant.formats.page import PageLayout
from quant.ops.experts import experts as run_pages


class GpuExperts:
    """Computes with the pages in the slots of a GPU."""

    def __init__(self, slots: GpuSlots) -> None:
        self._slots = slots

    @property
    def by_kernel(self) -> bool:
        """Whether a kernel finds the pages of a step by itself; else the host looks which are wanted."""
        return self._slots.device.type == "cuda" and self._slots.layout.codec in gpu.FORMATS

    def begin(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Start the experts of `layer` that are here -> weighted outputs float32 [n, k, hidden], zero for the others.

        x [n, hidden], chosen [n, k] and weights [n, k] are on the device; the result need not be ready yet.
        """
        self._slots.order()
        return self.begin_ordered(layer, x, chosen, weights)

    def begin_ordered(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`begin` behind `GpuSlots.order`, which is called once for many layers."""
        slots = self._slots
        if self.by_kernel:
            return gpu.experts(x, slots.layout, slots.slab, slots.table(layer), chosen, weights)
        out = torch.zeros(chosen.numel(), x.shape[1], device=x.device)
        for expert in chosen.unique().tolist():  # type: ignore[no-untyped-call]
            if (layer, expert) in slots:
                places = (chosen.reshape(-1) == expert).nonzero()[:, 0]
                page = slots.tensor((layer, expert))
                run_pages(x, slots.layout, [page], places, (0, len(places)), weights, out)
        return out.view(*chosen.shape, -1)


def measured_costs(tier: GpuTier, layout: PageLayout, dtype: torch.dtype) -> Costs:
    """What a copy of one page takes, and how much sooner one token's product is done on the device than on the CPU.

    Also gets the kernels compiled before anybody waits for an answer.
    """
    page = torch.zeros(layout.bytes, dtype=torch.uint8, pin_memory=tier.device.type == "cuda")
    x, chosen, weights = (
        torch.zeros(1, layout.hidden, dtype=dtype),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1),
    )
    on_device = [tensor.to(tier.device) for tensor in (x, chosen, weights)]
    slots = GpuSlots(tier, layout, {0: 1}, lambda pages: {}, Costs(0.0, 0.0))
    slots.put((0, 0), page)
    out = torch.empty(1, layout.hidden)
    on_gpu = _fastest_s(lambda: GpuExperts(slots).begin(0, *on_device).cpu())
    on_cpu = _fastest_s(lambda: run_pages(x, layout, [page], chosen.view(-1), (0, 1), weights, out))

    def upload() -> None:
        tier.fill(0, page)
        tier.settle()

    return Costs(saved_s=on_cpu - on_gpu, upload_s=_fastest_s(upload))


def _fastest_s(job: Callable[[], object], n: int = 5) -> float:
    """Seconds of the fastest of a few runs, the first one not counted."""
    took = []
    for _ in range(n + 1):
        began = time.perf_counter()
        job()
        took.append(time.perf_counter() - began)
    return min(took[1:])
