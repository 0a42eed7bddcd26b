"""ExpertStore: the only owner of expert pages in memory. Fetches them from disk into slots, evicts, counts.

Knows pages, slots and bytes; nothing of tokens or of what an expert computes.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass

from torch import Tensor

from localmimo.experts.policy import Lru, Page
from localmimo.experts.tiers import DiskTier, RamTier
from quant import Pack
from quant.pack import experts_of
from quant.page import PageLayout


@dataclass(slots=True)
class Traffic:
    """What was asked of the store so far."""

    ram_pages: int = 0  # found in RAM
    disk_pages: int = 0  # read from disk
    disk_bytes: int = 0

    def since(self, before: "Traffic") -> "Traffic":
        """The difference to an earlier reading."""
        earlier = asdict(before)
        return Traffic(**{name: value - earlier[name] for name, value in asdict(self).items()})

    def copy(self) -> "Traffic":
        return Traffic(**asdict(self))


@dataclass(frozen=True, slots=True)
class Arrival:
    """A page that can be used now."""

    expert: int
    layout: PageLayout
    page: Tensor  # uint8 [slot bytes]


class ExpertStore:
    """Pages of one pack in `n_slots` slots of RAM, over the pack's files on disk.

    One fetch at a time; pages yielded by `fetch` are pinned until the next ones are asked for.
    """

    def __init__(self, pack: Pack, slot_bytes: int, n_slots: int) -> None:
        self._pack = pack
        self._ram = RamTier(n_slots, slot_bytes)
        self._disk = DiskTier()
        self._slots: dict[Page, int] = {}
        self._free = list(range(n_slots - 1, -1, -1))
        self._pinned: set[Page] = set()
        counts = experts_of(pack)
        self._policy = Lru(max(counts, default=0) + 1, max(counts.values(), default=1))
        self.traffic = Traffic()

    @property
    def n_slots(self) -> int:
        return self._ram.n_slots

    @property
    def direct(self) -> bool:
        """Whether the disk is read around the page cache."""
        return self._disk.direct

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[list[Arrival]]:
        """Yield lists of arrivals: first the pages in RAM, while the others are being read, then those as they land.

        A page is valid until the next list is asked for.

        Raises BadModel where a page is bad.
        """
        held = [(layer, expert) for expert in experts if (layer, expert) in self._slots]
        missing = deque((layer, expert) for expert in experts if (layer, expert) not in self._slots)
        flying: dict[Future[None], tuple[Page, int]] = {}
        self._policy.request(layer, experts)
        try:
            self._pinned = set(held)
            self._start_reads(missing, flying)
            if held:
                self.traffic.ram_pages += len(held)
                yield self._use(held)
            while flying or missing:
                self._pinned.clear()
                self._start_reads(missing, flying)
                yield self._use(self._land(flying))
        finally:
            self._pinned.clear()
            self._abandon(flying)

    def _use(self, pages: list[Page]) -> list[Arrival]:
        return [Arrival(page[1], self._layout(page), self._ram.tensor(self._slots[page])) for page in pages]

    def _layout(self, page: Page) -> PageLayout:
        return self._pack.layouts[self._pack.page_at(*page).codec]

    def _start_reads(self, missing: deque[Page], flying: dict["Future[None]", tuple[Page, int]]) -> None:
        """Start reading as many missing pages as slots can be had for."""
        while missing and (slot := self._take_slot()) is not None:
            page = missing.popleft()
            flying[self._disk.read(self._pack.page_at(*page), self._ram.memory(slot))] = (page, slot)

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        victims = self._policy.victims(1, self._pinned)
        if not victims:
            return None
        self._policy.drop(victims[0])
        return self._slots.pop(victims[0])

    def _land(self, flying: dict["Future[None]", tuple[Page, int]]) -> list[Page]:
        """Wait for at least one read; take in, pinned, all that have come."""
        done, _ = wait(flying, return_when=FIRST_COMPLETED)
        landed = [
            self._take_in(read, *flying.pop(read)) for read in sorted(done, key=lambda read: flying[read][0])
        ]
        self._pinned = set(landed)
        return landed

    def _take_in(self, read: "Future[None]", page: Page, slot: int) -> Page:
        try:
            read.result()
        except BaseException:
            self._free.append(slot)
            raise
        self._slots[page] = slot
        self._policy.admit(page)
        self.traffic.disk_pages += 1
        self.traffic.disk_bytes += self._pack.page_at(*page).nbytes
        return page

    def _abandon(self, flying: dict["Future[None]", tuple[Page, int]]) -> None:
        """Wait for reads that nobody wants any more, and give their slots back."""
        wait(flying)
        self._free.extend(slot for _, slot in flying.values())
        flying.clear()

    def close(self) -> None:
        """Give everything back."""
        self._disk.close()
