"""GpuShelf: the pages that lie on the GPU, who comes and who goes, and their products there.

A page lies on the GPU or in RAM, not in both. On the device "cpu" the same code runs with a second slab in RAM, for
tests. Knows pages and slots; not who asks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from localmimo.experts.policy import Page
from localmimo.experts.slots import Slots
from localmimo.experts.tiers import GpuTier
from localmimo.experts.uploads import Costs, choose, most_uploads
from quant.ffn import experts as run_pages
from quant.page import PageLayout

EVERY = 8  # tokens between two looks at who should be here

Chances = Callable[[Sequence[Page]], Mapping[Page, float]]


class GpuShelf:
    """Pages of one layout in the slots of a GPU tier."""

    def __init__(
        self, tier: GpuTier, layout: PageLayout, n_experts: Mapping[int, int], chances: Chances, costs: Costs
    ) -> None:
        self._tier = tier
        self._layout = layout
        self._chances = chances
        self._costs = costs
        self._held: dict[Page, int] = {}
        self._free = list(range(tier.n_slots - 1, -1, -1))
        self._tables = {layer: torch.full((n,), -1, dtype=torch.int32) for layer, n in n_experts.items()}
        self._leaving: list[Page] = []
        self._tokens = 0

    def __contains__(self, page: Page) -> bool:
        return page in self._held

    def __iter__(self) -> Iterator[Page]:
        return iter(self._held)

    def tensor(self, page: Page) -> Tensor:
        """A page that lies here as uint8 [slot bytes] in RAM: the slot itself on the device "cpu", else a copy."""
        return self._tier.slab[self._held[page]].cpu()

    def turn(self, ram: Slots, token_s: float) -> int:
        """A new token begins: let pages come that pay back; the number of copies begun."""
        self._settle(ram)
        self._tokens += 1
        if self._tokens % EVERY:
            return 0
        swaps = choose(
            self._chances(list(ram)),
            self._chances(list(self._held)),
            len(self._free),
            most_uploads(token_s * EVERY, self._costs),
            self._costs,
        )
        for swap in swaps:
            slot = self._free.pop() if swap.instead is None else self._evict(swap.instead)
            self._tier.fill(slot, ram.tensor(swap.page))
            self._leaving.append(swap.page)
            self._place(swap.page, slot)
        return len(swaps)

    def _settle(self, ram: Slots) -> None:
        """The copies of the last turn are done: their places in RAM are free."""
        if self._leaving:
            self._tier.settle()
            for page in self._leaving:
                if page in ram:
                    ram.give(ram.evict(page))
            self._leaving.clear()

    def _place(self, page: Page, slot: int) -> None:
        self._held[page] = slot
        self._tables[page[0]][page[1]] = slot

    def _evict(self, page: Page) -> int:
        self._tables[page[0]][page[1]] = -1
        return self._held.pop(page)

    @property
    def leaving(self) -> list[Page]:
        """Pages that are being copied here: their slots in RAM must not be written yet."""
        return self._leaving

    def lies_here(self, layer: int, chosen: Tensor) -> Tensor:
        """Which of the chosen experts [n, k] lie here: bool [n, k]."""
        return self._tables[layer][chosen] >= 0

    def begin(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Start the experts of `layer` that lie here -> weighted outputs float32 [n, k, hidden], zero for the others.

        The result lies on the device and need not be ready yet: `.cpu()` waits for it.
        """
        self._tier.order()
        if self._tier.device.type == "cpu":
            return self._on_cpu(layer, x, chosen, weights)
        from quant import gpu

        device = self._tier.device
        there = [part.to(device, non_blocking=True) for part in (self._tables[layer], chosen, weights)]
        return gpu.experts(x.to(device, non_blocking=True), self._layout, self._tier.slab, *there)

    def _on_cpu(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(chosen.numel(), x.shape[1])
        for expert in chosen.unique().tolist():
            slot = int(self._tables[layer][expert])
            if slot >= 0:
                places = (chosen.reshape(-1) == expert).nonzero()[:, 0]
                page = self._tier.slab[slot]
                run_pages(x, self._layout, [page], places, (0, len(places)), weights, out)
        return out.view(*chosen.shape, -1)
