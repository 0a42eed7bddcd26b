"""GpuSlots: the pages that lie on the GPU, who comes and who goes, and their products there.

A page lies on the GPU or in RAM, not in both. Slots are lent to whoever needs them more than a page does: the keys and
values of a growing context. On the device "cpu" the same code runs with a second slab in RAM, for tests. Knows pages
and slots; not who asks, nor what is in a slot that was lent.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from localmimo.experts.policy.baselines import Page
from localmimo.experts.policy.promotion import Costs, choose, most_uploads
from localmimo.experts.tiers.ram_slots import RamSlots
from localmimo.experts.tiers.tiers import GpuTier
from localmimo.kv.block_table import BlockTable
from quant import gpu
from quant.formats.page import PageLayout
from quant.ops.experts import experts as run_pages

EVERY = 8  # tokens between two looks at who should be here, once no slot is free

Chances = Callable[[Sequence[Page]], Mapping[Page, float]]
Fits = Callable[[Page], bool]


class GpuSlots:
    """Pages of one layout in the slots of a GPU tier."""

    def __init__(
        self,
        tier: GpuTier,
        layout: PageLayout,
        n_experts: Mapping[int, int],
        chances: Chances,
        costs: Costs,
    ) -> None:
        self.fits: Fits = lambda page: True  # whether a page is of the layout
        self._tier = tier
        self._layout = layout
        self._n_experts = n_experts
        self._chances = chances
        self._costs = costs
        self._tables = {  # expert -> slot, on the device; -1: elsewhere
            layer: torch.full((n,), -1, dtype=torch.int32, device=tier.device)
            for layer, n in n_experts.items()
        }
        self._leaving: list[Page] = []
        self._borrowers: WeakSet[BlockTable] = WeakSet()
        self._full = tier.n_slots
        self._tokens = 0
        self._hold_nothing(n_lent=0)
        self.lock = threading.RLock()  # while it is held, no page moves for others' sake

    def _hold_nothing(self, n_lent: int) -> None:
        """Every slot behind the first ones, which are lent, is free."""
        self._n_lent = n_lent
        self._held: dict[Page, int] = {}
        self._n_held: Counter[int] = Counter()  # by layer
        self._free = list(range(self._tier.n_slots - 1, n_lent - 1, -1))

    def __contains__(self, page: Page) -> bool:
        return page in self._held

    def __iter__(self) -> Iterator[Page]:
        return iter(self._held)

    @property
    def n_slots(self) -> int:
        """Slots for pages: those that are not lent."""
        return self._tier.n_slots - self._n_lent

    @property
    def generation(self) -> int:
        """How often the slab has been another one."""
        return self._tier.generation

    @property
    def slab(self) -> Tensor:
        """uint8 [slots, bytes]; another one after `shrink`."""
        return self._tier.slab

    @property
    def n_free(self) -> int:
        return len(self._free)

    def has_all(self, layer: int) -> bool:
        """Whether every expert of a layer lies here."""
        return self._n_held[layer] == self._n_experts[layer]

    @property
    def by_kernel(self) -> bool:
        """Whether a kernel finds the pages of a step by itself; else the host looks which are wanted."""
        return self._tier.device.type == "cuda" and self._layout.codec in gpu.FORMATS

    def tensor(self, page: Page) -> Tensor:
        """A page that lies here, as uint8 [slot bytes] on the device; what is launched from now on sees it."""
        self._tier.order()
        return self._tier.slab[self._held[page]]

    # ---- who is here ----

    def put(self, page: Page, here: Tensor) -> None:
        """Start copying a page into a free slot; it must stay as it is until `settle`."""
        self._fill(self._free.pop(), page, here)

    def settle(self) -> None:
        """Wait for the copies."""
        self._tier.settle()

    def takes(self, page: Page) -> bool:
        """Whether a page could lie here."""
        return self.fits(page) and page not in self._held

    def turn(self, ram: RamSlots, token_s: float) -> int:
        """A new token begins, and all have `left`: let pages come that pay back; the number of copies begun."""
        self._tokens += 1
        if not self.n_slots or (self._tokens % EVERY and not self._free):
            return 0
        since_s = token_s if self._free else token_s * EVERY
        # At most half of what RAM holds: the others' slots are needed.
        most = min(most_uploads(since_s, self._costs), 1 + len(ram) // 2)
        coming = self._chances([page for page in ram if self.fits(page)])
        swaps = choose(coming, self._chances(list(self._held)), len(self._free), most, self._costs)
        for swap in swaps:
            slot = self._free.pop() if swap.instead is None else self._evict(swap.instead)
            self._fill(slot, swap.page, ram.tensor(swap.page))
            self._leaving.append(swap.page)
        return len(swaps)

    def left(self) -> list[Page]:
        """The pages whose copies of the last turn are done: their places in RAM are free."""
        if not self._leaving:
            return []
        self._tier.settle()
        left, self._leaving = self._leaving, []
        return left

    def _fill(self, slot: int, page: Page, here: Tensor) -> None:
        self._tier.fill(slot, here)
        self._held[page] = slot
        self._n_held[page[0]] += 1
        self._tables[page[0]][page[1]] = slot

    def _evict(self, page: Page) -> int:
        self._tables[page[0]][page[1]] = -1
        self._n_held[page[0]] -= 1
        return self._held.pop(page)

    @property
    def leaving(self) -> list[Page]:
        """Pages that are being copied here: their slots in RAM must not be written yet."""
        return self._leaving

    # ---- memory for others ----

    def allocate(self, borrower: BlockTable, n: int) -> list[int]:
        """n slots, free ones first, then those of the pages that are least likely to be used.

        Raises OutOfMemoryError where the device has taken so many back that it can not be.
        """
        with self.lock:
            all_lost = not self._tier.n_slots
            if all_lost and self._tier.resize(self._full, []):  # perhaps it can be had now
                self._hold_nothing(n_lent=0)
            self._tier.order()  # a copy into one of them may be under way
            n_missing = n - len(self._free)
            if n_missing > 0:
                chances = self._chances(list(self._held))
                for page in sorted(chances, key=lambda page: (chances[page], page))[:n_missing]:
                    if page in self._leaving:
                        self._leaving.remove(page)  # it stays in RAM
                    self._free.append(self._evict(page))
            if len(self._free) < n:
                raise torch.OutOfMemoryError(
                    f"{n} slots are needed for keys and values, {len(self._free)} are left."
                )
            self._borrowers.add(borrower)
            self._n_lent += n
            return [self._free.pop() for _ in range(n)]

    def free(self, slots: Sequence[int]) -> None:
        """Slots that were lent."""
        with self.lock:
            self._free.extend(slots)
            self._n_lent -= len(slots)

    def shrink(self) -> bool:
        """Give a quarter of the slots back to the device, with all pages that lie here; False where there are none.

        One slab cannot shrink, and there is no memory for a second one: its pages come again as they are used, and what
        lies in lent slots waits in RAM. Where even these cannot be had again it is lost.
        """
        with self.lock:
            if not self.n_slots:
                return False
            self._leaving.clear()  # copies of these are in RAM still
            for table in self._tables.values():
                table.fill_(-1)
            lent = [slot for borrower in self._borrowers for slot in borrower.slots]
            kept = self._tier.resize(max(len(lent), self._tier.n_slots * 3 // 4), lent)
            to = {slot: new for new, slot in enumerate(lent)} if kept else {}
            for borrower in self._borrowers:
                borrower.relocate(to)
            self._hold_nothing(n_lent=len(to))
            return kept

    # ---- products ----

    def begin(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Start the experts of `layer` that lie here -> weighted outputs float32 [n, k, hidden], zero for the others.

        x [n, hidden], chosen [n, k] and weights [n, k] lie on the device; the result need not be ready yet.
        """
        self.order()
        return self.begin_settled(layer, x, chosen, weights)

    def order(self) -> None:
        """What the device is given from now on waits for the copies begun so far; the host does not."""
        self._tier.order()

    def begin_settled(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`begin` behind `order`, once for many layers."""
        if self.by_kernel:
            return gpu.experts(x, self._layout, self._tier.slab, self._tables[layer], chosen, weights)
        out = torch.zeros(chosen.numel(), x.shape[1], device=x.device)
        for expert in chosen.unique().tolist():  # type: ignore[no-untyped-call]
            if (layer, expert) in self._held:
                page = self._tier.slab[self._held[layer, expert]]
                places = (chosen.reshape(-1) == expert).nonzero()[:, 0]
                run_pages(x, self._layout, [page], places, (0, len(places)), weights, out)
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
    there = [tensor.to(tier.device) for tensor in (x, chosen, weights)]
    shelf = GpuSlots(tier, layout, {0: 1}, lambda pages: {}, Costs(0.0, 0.0))
    shelf.put((0, 0), page)
    out = torch.empty(1, layout.hidden)
    on_gpu = _least(lambda: shelf.begin(0, *there).cpu())
    on_cpu = _least(lambda: run_pages(x, layout, [page], chosen.view(-1), (0, 1), weights, out))

    def upload() -> None:
        tier.fill(0, page)
        tier.settle()

    return Costs(saved_s=on_cpu - on_gpu, upload_s=_least(upload))


def _least(job: Callable[[], object], n: int = 5) -> float:
    """Seconds of the fastest of a few runs, the first one not counted."""
    took = []
    for _ in range(n + 1):
        began = time.perf_counter()
        job()
        took.append(time.perf_counter() - began)
    return min(took[1:])
