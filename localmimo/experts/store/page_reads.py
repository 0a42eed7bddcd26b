"""Reads of pages that are needed now, from the disk into slots of RAM.

Knows pages, slots and reads; not who asks, nor which slot to take.
"""

from collections.abc import Iterator

from localmimo.errors import BadModel
from localmimo.experts.policy.baselines import Page
from localmimo.experts.store.counters import PageCounters
from localmimo.experts.store.prefetch import PrefetchReads
from localmimo.experts.tiers.ram_slots import RamSlots, Read
from localmimo.experts.tiers.tiers import DiskTier, stalled
from quant import Pack


class PageReads:
    """The reads of one request. `abandon` ends it, however it went."""

    def __init__(
        self,
        pack: Pack,
        disk: DiskTier,
        slots: RamSlots,
        prefetches: PrefetchReads,
        counters: PageCounters,
        stall_s: float,
    ) -> None:
        self._pack = pack
        self._disk = disk
        self._slots = slots
        self._prefetches = prefetches
        self._counters = counters
        self._stall_s = stall_s
        self._reads: dict[Page, Read] = {}

    def __contains__(self, page: Page) -> bool:
        return page in self._reads

    def __len__(self) -> int:
        return len(self._reads)

    def __iter__(self) -> Iterator[Page]:
        return iter(self._reads)

    def has_arrived(self, page: Page) -> bool:
        """Whether the read of a page is over."""
        return self._reads[page].task.done()

    def begin(self, page: Page, slot: int) -> None:
        """Read a page into a slot, before all prefetches."""
        at = self._pack.page_at(*page)
        self._reads[page] = Read(self._disk.read(at, self._slots.memory(slot)), slot)

    def take_over(self, page: Page) -> None:
        """A prefetched page is needed now: wait for its read if that has begun, else read it before all prefetches."""
        prefetch = self._prefetches.take_over(page)
        if prefetch.task.cancelled():
            self.begin(page, prefetch.slot)
        else:
            self._reads[page] = prefetch

    def wait_for_any(self) -> list[Page]:
        """Wait for at least one read; all pages that have come, now in RAM. Raises BadModel where a page is bad."""
        if not self._disk.wait([read.task for read in self._reads.values()], self._stall_s):
            raise self._stalled(next(iter(self._reads)))
        landed = sorted(page for page, read in self._reads.items() if read.task.done())
        for page in landed:
            self._take_in(page)
        return landed

    def wait_for(self, page: Page) -> None:
        """Wait until a page is in RAM. Raises BadModel where it is bad."""
        if not self._disk.wait([self._reads[page].task], self._stall_s):
            raise self._stalled(page)
        self._take_in(page)

    def _take_in(self, page: Page) -> None:
        read = self._reads.pop(page)
        try:
            read.task.result()
        except BaseException:
            self._slots.release(read.slot)
            raise
        self._slots.put(page, read.slot)
        self._counters.disk_pages += 1
        self._counters.disk_bytes += self._pack.page_at(*page).nbytes

    def abandon(self) -> None:
        """The request is over: the slots of reads that are still under way come back when these end."""
        for read in self._reads.values():
            self._disk.cancel(read.task)
        self._slots.release_when_done(list(self._reads.values()))
        self._reads.clear()

    def _stalled(self, page: Page) -> BadModel:
        return stalled(*page, self._pack.page_at(*page), self._stall_s)
