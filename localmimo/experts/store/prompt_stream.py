"""Streaming a prompt: the pages of a layer in the order of the file, each read once, through a few slots.

So a long prompt does not push out the pages that decoding keeps. Knows pages and slots; nothing of tokens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from localmimo.experts.policy.baselines import Page
from localmimo.experts.store.counters import PageCounters
from localmimo.experts.store.page_reads import PageReads
from localmimo.experts.store.prefetch import PrefetchReads
from localmimo.experts.store.slot_supply import SlotSupply
from localmimo.experts.tiers.ram_slots import RamSlots

GROUP = 16  # pages that are handed over at a time
MOST_OF_A_LAYER = 0.9  # a prompt that wants so many of a layer's pages will want those of the next layer too


class PromptStream:
    """Gives a layer's pages in order while the next ones are read."""

    def __init__(
        self,
        n_experts: Mapping[int, int],
        slots: RamSlots,
        supply: SlotSupply,
        prefetches: PrefetchReads,
        counters: PageCounters,
        new_reads: Callable[[], PageReads],
        on_gpu: Callable[[Page], bool],
    ) -> None:
        self._n_experts = n_experts
        self._following = dict(pairwise(n_experts))  # layer -> the next one with experts
        self._slots = slots
        self._supply = supply
        self._prefetches = prefetches
        self._counters = counters
        self._new_reads = new_reads
        self._on_gpu = on_gpu

    def pages(self, layer: int, experts: Sequence[int]) -> Iterator[list[Page]]:
        """Yield lists of pages in memory that together are `experts` (ascending) in their order.

        They stay until the next list is asked for. Raises BadModel where a page is bad.
        """
        waiting = deque((layer, expert) for expert in experts)
        reads = self._new_reads()
        wants_most = len(experts) >= MOST_OF_A_LAYER * self._n_experts[layer]
        try:
            while waiting:
                self._supply.pinned = set(waiting)
                if self._read_ahead(waiting, reads) and wants_most:
                    self._begin_next_layer(layer, len(reads))
                ready = self._ready(waiting, reads)
                self._supply.pinned.update(ready)
                yield ready
        finally:
            self._supply.pinned.clear()
            reads.abandon()

    def _read_ahead(self, waiting: Sequence[Page], reads: PageReads) -> bool:
        """Start reading the next missing pages, as many as there are slots for; the first one in any case.

        True where all of them are being read.
        """
        for page in waiting:
            if page in reads or page in self._slots or self._on_gpu(page):
                continue
            if page in self._prefetches:
                self._supply.next_layer.discard(page)
                reads.take_over(page)
                continue
            slot = self._supply.take_for_stream(len(reads))
            if slot is None and not reads:
                slot = self._supply.take_from_last(waiting)
            if slot is None:
                return False
            self._supply.next_layer.discard(page)
            reads.begin(page, slot)
        return True

    def _begin_next_layer(self, layer: int, n_in_flight: int) -> None:
        """The disk is done with a layer that wanted nearly all its pages: the next one will too, in file order."""
        following = self._following.get(layer)
        if following is None:
            return
        for page in self._missing((following, expert) for expert in range(self._n_experts[following])):
            slot = self._supply.take_for_stream(n_in_flight)
            if slot is None:
                return
            self._prefetches.begin(page, slot)
            self._supply.next_layer.add(page)

    def _missing(self, pages: Iterable[Page]) -> list[Page]:
        return [
            page
            for page in pages
            if not (page in self._slots or page in self._prefetches or self._on_gpu(page))
        ]

    def _ready(self, waiting: deque[Page], reads: PageReads) -> list[Page]:
        """Take the first pages off `waiting`: at least one, and what has come after it without a gap."""
        ready: list[Page] = []
        while waiting and len(ready) < GROUP:
            page = waiting[0]
            if page in reads:
                if ready and not reads.has_arrived(page):
                    break
                reads.wait_for(page)
                self._supply.note_streamed(page)
            elif page in self._slots:
                self._use(page)
            elif self._on_gpu(page):
                self._counters.gpu_pages += 1
            else:
                break
            ready.append(waiting.popleft())
        return ready

    def _use(self, page: Page) -> None:
        """A page in RAM is used: decode's, or one that was prefetched for this prompt."""
        if page not in self._supply.next_layer:
            self._counters.ram_pages += 1
            return
        self._supply.next_layer.discard(page)
        self._counters.disk_pages += 1
        self._supply.note_streamed(page)
