"""Prefetching: pages that are read before a request needs them, into slots, while the disk has nothing better to do.

Three kinds share it: the hottest pages at the start, those that the next layer's router will probably want, and those
that a prompt will stream through next. Knows pages, slots and reads; not who asked for them or why.
"""

from collections import deque
from collections.abc import Sequence
from functools import partial

from localmimo.errors import BadModel
from localmimo.experts.policy.baselines import Page
from localmimo.experts.store.counters import PageCounters
from localmimo.experts.store.prefetch_gate import PrefetchGate
from localmimo.experts.tiers.gpu_slots import GpuSlots
from localmimo.experts.tiers.io_threads import Task
from localmimo.experts.tiers.ram_slots import RamSlots, Read
from localmimo.experts.tiers.tiers import DiskTier
from quant import Pack


class PrefetchReads:
    """Reads under way, or waiting for an idle disk, that no request needs yet; and what they were worth."""

    def __init__(
        self, pack: Pack, disk: DiskTier, slots: RamSlots, counters: PageCounters, gate: PrefetchGate | None
    ) -> None:
        self._pack = pack
        self._disk = disk
        self._slots = slots
        self._counters = counters
        self._gate = gate
        self._reads: dict[Page, Read] = {}
        self._landed: deque[Page] = deque()  # reported by the readers' threads, not taken in yet
        self.routed: set[Page] = set()  # named by a router, read or not: kept until their layer's turn

    def __contains__(self, page: Page) -> bool:
        return page in self._reads

    def __len__(self) -> int:
        """Reads that are not over, or not taken in."""
        return len(self._reads)

    @property
    def tasks(self) -> list[Task]:
        return [read.task for read in self._reads.values()]

    def begin(self, page: Page, slot: int) -> None:
        """Read `page` into `slot` when the disk is idle."""
        at = self._pack.page_at(*page)
        task = self._disk.prefetch(at, self._slots.memory(slot), partial(self._landed.append, page))
        self._reads[page] = Read(task, slot)

    def take_over(self, page: Page) -> Read:
        """The read of a page that is needed now; the caller reads it anew if the task is cancelled."""
        read = self._reads.pop(page)
        self._disk.cancel(read.task)
        return read

    def cancel_last(self) -> tuple[Page, int] | None:
        """The last page that no router named and whose read has not begun, with its slot, which is the caller's."""
        for page in reversed(self._reads):
            if page not in self.routed and self._disk.cancel(self._reads[page].task):
                return page, self._reads.pop(page).slot
        return None

    # ---- what has been read ----

    def settle(self, layer: int, wanted: Sequence[Page]) -> None:
        """Take in what has been read, and count what the router's prefetches for `layer` were worth."""
        self._take_in()
        due = {page for page in self.routed if page[0] == layer}
        if due:
            self.routed -= due
            self._count(due, due.intersection(wanted))

    def wait_for_slot(self, timeout_s: float) -> None:
        """Wait for one of the reads that nobody needs now, and take in all that are over."""
        self._disk.wait([*self._slots.pending, *self.tasks], timeout_s)
        self._landed.extend(page for page, read in self._reads.items() if read.task.done())
        self._take_in()

    def _take_in(self) -> None:
        """Put the pages that have been read into their slots."""
        while self._landed:
            page = self._landed.popleft()
            if page not in self._reads or not self._reads[page].task.done():
                continue
            read = self._reads.pop(page)
            if self._succeeded(read):
                self._slots.put(page, read.slot)
                self._counters.disk_bytes += self._pack.page_at(*page).nbytes
            else:
                self.routed.discard(page)

    def _succeeded(self, read: Read) -> bool:
        try:
            read.task.result()
        except BadModel:  # an error for the request that needs the page
            self._slots.release(read.slot)
            return False
        return True

    def _count(self, due: set[Page], useful: set[Page]) -> None:
        """A useful page that is in RAM already was still read from disk."""
        n_wasted = sum(1 for page in due - useful if not self._drop(page))
        n_in_ram = sum(1 for page in useful if page in self._slots)
        self._counters.disk_pages += n_in_ram
        self._counters.ram_pages -= n_in_ram
        self._counters.prefetch_useful += len(useful)
        self._counters.prefetch_wasted += n_wasted
        if self._gate is not None:
            self._gate.judge(len(useful), n_wasted)

    def _drop(self, page: Page) -> bool:
        """Cancel a prefetch that was wrong; False where its read has begun."""
        if page not in self._reads or not self._disk.cancel(self._reads[page].task):
            return False
        self._slots.release(self._reads.pop(page).slot)
        return True

    # ---- to the GPU ----

    def read_to_gpu(self, pages: Sequence[Page], gpu: GpuSlots, timeout_s: float) -> int:
        """Read pages through free slots to the GPU, as many as there are slots; how many were read.

        A page that cannot be read stays on disk, for the request that needs it.
        """
        reads = {
            page: Read(self._disk.read(self._pack.page_at(*page), self._slots.memory(slot)), slot)
            for page, slot in zip(pages, self._slots.take(len(pages)), strict=False)
        }
        self._disk.wait([read.task for read in reads.values()], timeout_s, every=True)
        good = [page for page, read in reads.items() if read.task.done() and read.task.error is None]
        for page in good:
            gpu.put(page, self._slots.data(reads[page].slot))
        gpu.settle()
        self._slots.release_when_done(list(reads.values()))
        self._counters.disk_bytes += sum(self._pack.page_at(*page).nbytes for page in good)
        return len(reads)
