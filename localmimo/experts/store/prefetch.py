"""Guesses: pages that are read before anybody asks for them, into slots, while the disk has nothing better to do.

Three kinds share it: the hottest pages at the start, those that the next layer's router will probably want, and those
that a prompt will stream through next. Knows pages, slots and reads; not who guessed or why.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial

from localmimo.errors import BadModel
from localmimo.experts.policy.baselines import Page
from localmimo.experts.tiers.gpu_slots import GpuSlots
from localmimo.experts.tiers.io_threads import Task
from localmimo.experts.tiers.ram_slots import RamSlots, Read
from localmimo.experts.tiers.tiers import DiskTier
from quant.pack.pack import PageAt


class PrefetchReads:
    """Reads under way, or waiting for an idle disk, that nobody has asked for."""

    def __init__(self, disk: DiskTier, slots: RamSlots) -> None:
        self._disk = disk
        self._slots = slots
        self._reads: dict[Page, Read] = {}
        self._landed: deque[Page] = deque()  # told by the readers' threads, not taken in yet
        self.routed: set[Page] = set()  # guessed by a router, read or not: kept until their layer's turn

    def __contains__(self, page: Page) -> bool:
        return page in self._reads

    def __len__(self) -> int:
        """Reads that are not over, or not taken in."""
        return len(self._reads)

    @property
    def tasks(self) -> list[Task]:
        return [read.task for read in self._reads.values()]

    def begin(self, page: Page, at: PageAt, slot: int) -> None:
        """Read `page` into `slot` when the disk is idle."""
        task = self._disk.guess(at, self._slots.memory(slot), partial(self._landed.append, page))
        self._reads[page] = Read(task, slot)

    def lift(self, pages: Mapping[Page, PageAt], gpu: GpuSlots, timeout_s: float) -> tuple[int, int]:
        """Read pages through free slots to the GPU, as many as there are slots; pages and bytes that were read.

        A page that cannot be read stays where it is, for whoever asks for it.
        """
        slots = self._slots.take(len(pages))
        reads = {
            page: Read(self._disk.read(pages[page], self._slots.memory(slot)), slot)
            for page, slot in zip(pages, slots, strict=False)
        }
        self._disk.wait([read.task for read in reads.values()], timeout_s, every=True)
        there = [page for page, read in reads.items() if read.task.done() and read.task.error is None]
        for page in there:
            gpu.put(page, self._slots.bytes_in(reads[page].slot))
        gpu.settle()
        self._slots.owe(reads.values())
        return len(reads), sum(pages[page].nbytes for page in there)

    def claim(self, page: Page) -> Read:
        """Take over the read of a page that is needed now; the caller reads it anew if the task is cancelled."""
        guess = self._reads.pop(page)
        self._disk.cancel(guess.task)
        return guess

    def landed(self) -> Iterator[Page]:
        """Put the pages that have been read since into their slots, and name them."""
        while self._landed:
            page = self._landed.popleft()
            if page in self._reads and self._reads[page].task.done():
                read = self._reads.pop(page)
                if self._succeeded(read):
                    self._slots.put(page, read.slot)
                    yield page
                else:
                    self.routed.discard(page)

    def note_all_done(self) -> None:
        """See to it that `landed` finds every read that is over."""
        self._landed.extend(page for page, read in self._reads.items() if read.task.done())

    def _succeeded(self, read: Read) -> bool:
        try:
            read.task.result()
        except BadModel:  # an error for whoever asks for the page
            self._slots.give(read.slot)
            return False
        return True

    def drop(self, page: Page) -> bool:
        """Take back a guess that was wrong; False where its read has begun."""
        if page not in self._reads or not self._disk.cancel(self._reads[page].task):
            return False
        self._slots.give(self._reads.pop(page).slot)
        return True

    def take_back(self) -> tuple[Page, int] | None:
        """The last page that no router guessed and whose read has not begun, with its slot, which is the caller's."""
        for page in reversed(self._reads):
            if page not in self.routed and self._disk.cancel(self._reads[page].task):
                return page, self._reads.pop(page).slot
        return None

    def due(self, layer: int) -> set[Page]:
        """The router's guesses for `layer`, whose turn has come; they are kept no longer."""
        due = {page for page in self.routed if page[0] == layer}
        self.routed -= due
        return due
