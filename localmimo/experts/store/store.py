"""ExpertStore: the only owner of expert pages in memory. Fetches them from disk into slots, evicts, counts.

Knows pages, slots and bytes; nothing of tokens or of what an expert computes.

Two ways to ask. `fetch` serves a decode step: a few pages of a layer, those in RAM at once, others as they are read
(step_fetch.py). `stream` serves a prompt: many pages of a layer in the order of the file, through a few slots
(prompt_stream.py).
"""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor

from localmimo.experts.policy.baselines import Page, Policy
from localmimo.experts.store.counters import PageCounters
from localmimo.experts.store.deferred_counts import DeferredCounts
from localmimo.experts.store.page_reads import PageReads
from localmimo.experts.store.prefetch import PrefetchReads
from localmimo.experts.store.prefetch_gate import PrefetchGate
from localmimo.experts.store.prompt_stream import PromptStream
from localmimo.experts.store.slot_supply import SlotSupply
from localmimo.experts.store.step_fetch import StepFetch
from localmimo.experts.tiers.gpu_slots import GpuSlots
from localmimo.experts.tiers.pinning import Pinning
from localmimo.experts.tiers.ram_slots import Arrival, RamSlots
from localmimo.experts.tiers.tiers import DiskTier, RamTier
from localmimo.limits import N_READERS
from quant import Pack
from quant.formats.page import PageLayout
from quant.pack.pack import experts_of

STALL_S = 60.0  # a disk that gives nothing for so long is taken for broken
PREFETCH_SHARE = 4  # one slot in so many holds pages that a router named in advance, at the most
FREE_SHARE = 64  # one in so many, as many as there are readers at the most, is free when a layer asks


class ExpertStore:
    """Pages of one pack in `n_slots` slots of RAM, over the pack's files on disk.

    One request at a time; pages yielded by `fetch` and `stream` stay until the next ones are asked for.
    """

    def __init__(
        self,
        pack: Pack,
        slot_bytes: int,
        n_slots: int,
        policy: Policy,
        *,
        prefetch: bool = True,
        trust: bool = False,
        stall_s: float = STALL_S,
        gpu: GpuSlots | None = None,
        pinning: Pinning | None = None,
    ) -> None:
        self._pack = pack
        self.gpu = gpu
        self._one_layout = next(iter(pack.layouts.values())) if len(pack.layouts) == 1 else None
        self._n_slots_at_most = n_slots
        self._stall_s = stall_s
        self._policy = policy
        self._counters = PageCounters()
        self._disk = DiskTier(trust=trust)
        self._slots = RamSlots(RamTier(n_slots, slot_bytes, pinning), policy)
        self._gate = PrefetchGate() if prefetch and 4 <= n_slots < pack.n_pages else None
        self._prefetches = PrefetchReads(pack, self._disk, self._slots, self._counters, self._gate)
        self._supply = SlotSupply(self._slots, self._prefetches, gpu, stall_s)
        new_reads = partial(
            PageReads, pack, self._disk, self._slots, self._prefetches, self._counters, stall_s
        )
        self._step_fetch = StepFetch(
            policy, self._slots, self._supply, self._prefetches, self._counters, new_reads, self._n_kept_free
        )
        self._prompt_stream = PromptStream(
            experts_of(pack),
            self._slots,
            self._supply,
            self._prefetches,
            self._counters,
            new_reads,
            self._on_gpu,
        )
        self.deferred = DeferredCounts(policy, self._counters)
        self._layer = -1  # of the last step's request
        self._token_began_s = time.perf_counter()
        self.lock = threading.RLock() if gpu is None else gpu.lock  # held: no page moves

    # ---- facts ----

    @property
    def n_slots(self) -> int:
        """Slots in use now: fewer than were given while the system is short of memory."""
        return self._slots.n_slots

    @property
    def direct(self) -> bool:
        """Whether the disk is read around the page cache."""
        return self._disk.direct

    @property
    def prefetching(self) -> bool:
        """Whether prefetching is measured to pay now."""
        return self._gate is not None and self._gate.open

    @property
    def counters(self) -> PageCounters:
        """What was asked so far."""
        if self.deferred.waiting:
            with self.lock:
                self.deferred.count_steps()
        self._counters.read_s = self._disk.busy_s
        return self._counters

    def where(self) -> dict[Page, str]:
        """The tier of every page that is not on disk alone."""
        with self.lock:
            return dict.fromkeys(self._slots, "ram") | dict.fromkeys(self.gpu or (), "gpu")

    # ---- a decode step ----

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[list[Arrival]]:
        """Yield lists of arrivals: first the pages in RAM (or none), while the others are read, then as they arrive.

        A page is valid until the next list is asked for. Pages on the GPU are left out: they are computed there.
        Raises BadModel where a page is bad.
        """
        with self.lock:
            self.deferred.count()
            elsewhere = experts if self.gpu is None else self.without_gpu(layer, experts)
            pages = [(layer, expert) for expert in elsewhere]
            self._prefetches.settle(layer, pages)
            if self._gate is not None:
                self._gate.step(layer, any(page not in self._slots for page in pages))
            for arrived in self._step_fetch.pages(layer, experts, pages):
                yield self._arrivals(arrived)

    def _n_kept_free(self) -> int:
        """Slots that are free when a layer asks: none where every page has one."""
        return min(N_READERS, self.n_slots // FREE_SHARE) if self.n_slots < self._pack.n_pages else 0

    def _arrivals(self, pages: Sequence[Page]) -> list[Arrival]:
        return [Arrival(page[1], self._layout(page), self._tensor(page)) for page in pages]

    def _layout(self, page: Page) -> PageLayout:
        return self._one_layout or self._pack.layouts[self._pack.page_at(*page).codec]

    def _tensor(self, page: Page) -> Tensor:
        if self.gpu is not None and page in self.gpu:
            return self.gpu.tensor(page)
        return self._slots.tensor(page)

    def _on_gpu(self, page: Page) -> bool:
        return self.gpu is not None and page in self.gpu

    # ---- a prompt ----

    def stream(self, layer: int, experts: Sequence[int]) -> Iterator[list[Arrival]]:
        """Yield lists of arrivals that together are `experts` (ascending) in their order, read ahead of their use.

        Pages on the GPU are yielded too, as they are there. A page is valid until the next list is asked for.
        Raises BadModel where a page is bad.
        """
        with self.lock:
            self._prefetches.settle(layer, [(layer, expert) for expert in experts])
            for pages in self._prompt_stream.pages(layer, experts):
                yield self._arrivals(pages)

    def note_prompt(self, layer: int, tail: list[list[int]]) -> None:
        """The experts of a prompt's last tokens at `layer`: all of a long prompt that enters the statistics."""
        self.deferred.note_prompt(layer, tail)

    # ---- the GPU's part ----

    def begin_layer(self, layer: int) -> None:
        """A step comes to `layer`. Where a new token begins, pages may go to the GPU."""
        if layer <= self._layer and self.gpu is not None:
            self.deferred.count()
            self._supply.release_uploaded()
            now = time.perf_counter()
            self._counters.uploads += self.gpu.begin_token(self._slots, now - self._token_began_s)
            self._token_began_s = now
        self._layer = layer

    def without_gpu(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of the experts that are not on the GPU; the others are counted as found there."""
        elsewhere = [expert for expert in experts if not self._on_gpu((layer, expert))]
        self._counters.gpu_pages += len(experts) - len(elsewhere)
        return elsewhere

    def promote(self, pages: Sequence[Page]) -> int:
        """Bring pages to free slots of the GPU before a request needs them; how many were read."""
        assert self.gpu is not None
        with self.lock:
            pages = [page for page in self._absent(pages) if self.gpu.takes(page)][: self.gpu.n_free]
            return self._prefetches.read_to_gpu(pages, self.gpu, self._stall_s)

    # ---- slots ----

    def resize(self, n_slots: int) -> None:
        """Use this many slots, at least one and at most those given at first; the others' memory goes back."""
        with self.lock:
            n_slots = min(max(1, n_slots), self._n_slots_at_most)
            self._slots.revoke(self._supply.take(max(0, self.n_slots - n_slots)))
            self._slots.restore(n_slots - self.n_slots)

    # ---- before a request ----

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Read pages that a later layer will probably ask for, while the disk has nothing better to do."""
        with self.lock:
            n_free = max(0, self._n_slots_at_most // PREFETCH_SHARE - len(self._prefetches.routed))
            pages = self._absent((layer, expert) for expert in experts)[:n_free]
            for page, slot in zip(pages, self._supply.take(len(pages)), strict=False):
                self._prefetches.begin(page, slot)
                self._prefetches.routed.add(page)

    def warm(self, pages: Sequence[Page]) -> None:
        """Fill free slots with these pages, hottest first, in the background, before a request needs them.

        They are read in quarters, the hottest first, each in the order of the files.
        """
        with self.lock:
            pages = self._absent(pages)[: self._slots.n_free]
            quarter = max(1, -(-len(pages) // 4))
            order = [page for i in range(0, len(pages), quarter) for page in sorted(pages[i : i + quarter])]
            for page, slot in zip(order, self._slots.take(len(order)), strict=False):
                self._prefetches.begin(page, slot)

    def wait_until_warm(self, timeout_s: float | None = None) -> None:
        """Wait for the pages that are being read in the background."""
        with self.lock:
            self._disk.wait(self._prefetches.tasks, timeout_s, every=True)

    def _absent(self, pages: Iterable[Page]) -> list[Page]:
        return [
            page
            for page in pages
            if not (page in self._slots or page in self._prefetches or self._on_gpu(page))
        ]

    def close(self) -> None:
        """Stop reading and give the files back."""
        with self.lock:
            self._disk.close()
