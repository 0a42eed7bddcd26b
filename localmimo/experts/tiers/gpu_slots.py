"""GpuSlots: which pages are on the GPU, which ones come and go, and the slots that hold keys and values instead.

A page is on the GPU or in RAM, not in both. Keys and values of a growing context take slots from pages. On the device
"cpu" the same code runs with a second slab in RAM, for tests. Knows pages and slots; not what an expert computes.
"""

import threading
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
from quant.formats.page import PageLayout

EVERY = 8  # tokens between two comparisons of the pages here with those in RAM, once no slot is free

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
        self.layout = layout
        self._n_experts = n_experts
        self._chances = chances
        self._costs = costs
        self._tables = {  # expert -> slot, on the device; -1: elsewhere
            layer: torch.full((n,), -1, dtype=torch.int32, device=tier.device)
            for layer, n in n_experts.items()
        }
        self.uploading: list[Page] = []  # being copied here: their slots in RAM must not be written yet
        self._block_tables: WeakSet[BlockTable] = WeakSet()
        self._full = tier.n_slots
        self._tokens = 0
        self._hold_nothing(n_kv_slots=0)
        self.lock = threading.RLock()  # while it is held, no page moves for others' sake

    def _hold_nothing(self, n_kv_slots: int) -> None:
        """Every slot behind the first ones, which hold keys and values, is free."""
        self._n_kv_slots = n_kv_slots
        self._held: dict[Page, int] = {}
        self._n_held: Counter[int] = Counter()  # by layer
        self._free = list(range(self._tier.n_slots - 1, n_kv_slots - 1, -1))

    def __contains__(self, page: Page) -> bool:
        return page in self._held

    def __iter__(self) -> Iterator[Page]:
        return iter(self._held)

    @property
    def n_slots(self) -> int:
        """Slots for pages: those that hold no keys and values."""
        return self._tier.n_slots - self._n_kv_slots

    @property
    def device(self) -> torch.device:
        return self._tier.device

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
        """Whether every expert of a layer is on the GPU."""
        return self._n_held[layer] == self._n_experts[layer]

    def tensor(self, page: Page) -> Tensor:
        """A page on the GPU, as uint8 [slot bytes] on the device; what is launched from now on sees it."""
        self._tier.order()
        return self._tier.slab[self._held[page]]

    # ---- pages ----

    def put(self, page: Page, data: Tensor) -> None:
        """Start copying a page into a free slot; it must stay as it is until `settle`."""
        self._fill(self._free.pop(), page, data)

    def settle(self) -> None:
        """Wait for the copies."""
        self._tier.settle()

    def takes(self, page: Page) -> bool:
        """Whether a page could be put here."""
        return self.fits(page) and page not in self._held

    def begin_token(self, ram: RamSlots, token_s: float) -> int:
        """A new token begins, and all have `uploaded`: let pages come that pay back; the number of copies begun."""
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
            self.uploading.append(swap.page)
        return len(swaps)

    def uploaded(self) -> list[Page]:
        """The pages whose copies of the last turn are done: their places in RAM are free."""
        if not self.uploading:
            return []
        self._tier.settle()
        uploaded, self.uploading = self.uploading, []
        return uploaded

    def order(self) -> None:
        """What the device is given from now on waits for the copies begun so far; the host does not."""
        self._tier.order()

    def table(self, layer: int) -> Tensor:
        """Expert -> slot, int32 [experts] on the device; -1: not on the GPU."""
        return self._tables[layer]

    def _fill(self, slot: int, page: Page, data: Tensor) -> None:
        self._tier.fill(slot, data)
        self._held[page] = slot
        self._n_held[page[0]] += 1
        self._tables[page[0]][page[1]] = slot

    def _evict(self, page: Page) -> int:
        self._tables[page[0]][page[1]] = -1
        self._n_held[page[0]] -= 1
        return self._held.pop(page)

    # ---- slots for keys and values ----

    def allocate(self, block_table: BlockTable, n: int) -> list[int]:
        """n slots for keys and values, free ones first, then those of the pages that are least likely to be used.

        Raises OutOfMemoryError where the device has taken so many back that it can not be.
        """
        with self.lock:
            all_lost = not self._tier.n_slots
            if all_lost and self._tier.resize(self._full, []):  # perhaps it can be had now
                self._hold_nothing(n_kv_slots=0)
            self._tier.order()  # a copy into one of them may be under way
            n_missing = n - len(self._free)
            if n_missing > 0:
                chances = self._chances(list(self._held))
                for page in sorted(chances, key=lambda page: (chances[page], page))[:n_missing]:
                    if page in self.uploading:
                        self.uploading.remove(page)  # it stays in RAM
                    self._free.append(self._evict(page))
            if len(self._free) < n:
                raise torch.OutOfMemoryError(
                    f"{n} slots are needed for keys and values, {len(self._free)} are left."
                )
            self._block_tables.add(block_table)
            self._n_kv_slots += n
            return [self._free.pop() for _ in range(n)]

    def free(self, slots: Sequence[int]) -> None:
        """Take back slots of `allocate`."""
        with self.lock:
            self._free.extend(slots)
            self._n_kv_slots -= len(slots)

    def shrink(self) -> bool:
        """Give a quarter of the slots back to the device, with all pages; False where there are none.

        One slab cannot shrink, and there is no memory for a second one: its pages come again as they are used, and keys
        and values wait in RAM. Where even their slots cannot be had again they are lost.
        """
        with self.lock:
            if not self.n_slots:
                return False
            self.uploading.clear()  # copies of these are in RAM still
            for table in self._tables.values():
                table.fill_(-1)
            kv_slots = [slot for block_table in self._block_tables for slot in block_table.slots]
            kept = self._tier.resize(max(len(kv_slots), self._tier.n_slots * 3 // 4), kv_slots)
            to = {slot: new for new, slot in enumerate(kv_slots)} if kept else {}
            for block_table in self._block_tables:
                block_table.relocate(to)
            self._hold_nothing(n_kv_slots=len(to))
            return kept
