"""ExpertStore: the only owner of expert pages in memory. Fetches them from disk into slots, evicts, counts.

Knows pages, slots and bytes; nothing of tokens or of what an expert computes.

Two ways to ask. `fetch` serves a decode step: a few pages of a layer, those in RAM at once, the others as they land.
`stream` serves a prompt: many pages of a layer in the order of the file, each read once into a few slots that go
round, so that a long prompt does not push out what decode had kept.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor

from localmimo.errors import BadModel
from localmimo.experts.policy import Page, Policy
from localmimo.experts.prefetch import PrefetchGate
from localmimo.experts.tiers import DiskTier, RamTier
from quant import Pack
from quant.pack import PageAt, experts_of
from quant.page import PageLayout

STALL_S = 60.0  # a disk that gives nothing for so long is taken for broken
GROUP = 16  # pages of a prompt's stream handed over at a time
RING_SHARE = 8  # one slot in so many is used to stream a prompt
MOST = 0.9  # a prompt that wants so many of a layer's pages will want those of the next layer too


@dataclass(slots=True)
class Traffic:
    """What was asked of the store so far."""

    gpu_pages: int = 0  # found on the GPU
    ram_pages: int = 0  # found in RAM
    disk_pages: int = 0  # read from disk, on demand or by a guess that was right
    disk_bytes: int = 0  # read in all, wrong guesses included
    read_s: float = 0.0  # time in which at least one read was under way
    prefetch_useful: int = 0  # guessed pages that were then asked for
    prefetch_wasted: int = 0  # guessed pages that were read for nothing

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


@dataclass(frozen=True, slots=True)
class Read:
    """A read under way, or waiting its turn, into a slot."""

    future: "Future[None]"
    slot: int


class ExpertStore:
    """Pages of one pack in `n_slots` slots of RAM, over the pack's files on disk.

    One request at a time; pages yielded by `fetch` and `stream` are pinned until the next ones are asked for.
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
    ) -> None:
        self._pack = pack
        self._n_experts = experts_of(pack)
        self._next_layer = dict(pairwise(self._n_experts))
        self._ram = RamTier(n_slots, slot_bytes)
        self._disk = DiskTier(trust=trust)
        self._policy = policy
        self._slots: dict[Page, int] = {}
        self._free = list(range(n_slots - 1, -1, -1))
        self._revoked: list[int] = []  # slots whose memory the system has back
        self._stuck: list[Read] = []  # reads that a stalled disk still owes
        self._pinned: set[Page] = set()
        self._guesses: dict[Page, Read] = {}  # pages read before they are asked for
        self._guessed: set[Page] = set()  # those of them that a router guessed, until their layer's turn
        self._ahead: set[Page] = set()  # those of them that a prompt will stream through next
        self._landed: deque[Page] = deque()  # guesses whose reads are over, not taken in yet
        self._ring: deque[Page] = deque()  # pages that the last prompts streamed through, oldest first
        self._tail: dict[int, list[list[int]]] = {}
        self._gate = PrefetchGate() if prefetch and 4 <= n_slots < pack.n_pages else None
        self._stall_s = stall_s
        self._lock = threading.RLock()
        self._traffic = Traffic()

    # ---- facts ----

    @property
    def n_slots(self) -> int:
        """Slots in use now: fewer than were given while the system is short of memory."""
        return self._ram.n_slots - len(self._revoked)

    @property
    def direct(self) -> bool:
        """Whether the disk is read around the page cache."""
        return self._disk.direct

    @property
    def prefetching(self) -> bool:
        """Whether guesses are wanted now."""
        return self._gate is not None and self._gate.open

    @property
    def traffic(self) -> Traffic:
        """What was asked so far."""
        self._traffic.read_s = self._disk.busy_s
        return self._traffic

    def where(self) -> dict[Page, str]:
        """The tier of every page that is not on disk alone."""
        return dict.fromkeys(self._slots, "ram")

    # ---- a decode step ----

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[list[Arrival]]:
        """Yield lists of arrivals: first the pages in RAM (or none), while the others are read, then as they land.

        A page is valid until the next list is asked for. Raises BadModel where a page is bad.
        """
        pages = [(layer, expert) for expert in experts]
        with self._lock:
            self._count_prompt()
            self._policy.request(layer, experts)
            self._settle(layer, pages)
            yield from self._serve(pages)

    def _serve(self, pages: list[Page]) -> Iterator[list[Arrival]]:
        held = [page for page in pages if page in self._slots]
        missing = deque(page for page in pages if page not in self._slots)
        flying: dict[Page, Read] = {}
        if self._gate is not None:
            self._gate.step(pages[0][0] if pages else 0, bool(missing))
        try:
            self._pinned = set(held)
            self._start_reads(missing, flying)
            self._traffic.ram_pages += len(held)
            for page in self._pinned.intersection(self._ring):
                self._ring.remove(page)  # decode uses it: now the policy decides
            yield self._arrivals(held)
            while flying or missing:
                self._pinned.clear()
                self._start_reads(missing, flying)
                yield self._arrivals(self._land(flying))
        finally:
            self._pinned.clear()
            self._abandon(flying)

    def _arrivals(self, pages: Sequence[Page]) -> list[Arrival]:
        return [
            Arrival(page[1], self._pack.layouts[self._at(page).codec], self._ram.tensor(self._slots[page]))
            for page in pages
        ]

    def _at(self, page: Page) -> PageAt:
        return self._pack.page_at(*page)

    def _start_reads(self, missing: deque[Page], flying: dict[Page, Read]) -> None:
        """Start reading as many missing pages as slots can be had for."""
        for page in [page for page in missing if page in self._guesses]:
            flying[page] = self._claim(page)
            missing.remove(page)
        slots = self._take_slots(len(missing)) if missing else []
        if missing and not slots and not flying and not self._pinned:
            slots = [self._must_take_slot()]
        for slot in slots:
            page = missing.popleft()
            flying[page] = self._read(page, slot)

    def _read(self, page: Page, slot: int) -> Read:
        return Read(self._disk.read(self._at(page), self._ram.memory(slot)), slot)

    def _claim(self, page: Page) -> Read:
        """A guessed page is needed now: wait for its read if that has begun, else read it before all guesses."""
        self._ahead.discard(page)
        guess = self._guesses.pop(page)
        return self._read(page, guess.slot) if guess.future.cancel() else guess

    def _land(self, flying: dict[Page, Read]) -> list[Page]:
        """Wait for at least one read; take in, pinned, all that have come."""
        wait([read.future for read in flying.values()], self._stall_s, FIRST_COMPLETED)
        landed = sorted(page for page, read in flying.items() if read.future.done())
        if not landed:
            raise self._stalled(flying)
        for page in landed:
            self._take_in(page, flying.pop(page))
            self._traffic.disk_pages += 1
        self._pinned = set(landed)
        return landed

    def _take_in(self, page: Page, read: Read) -> None:
        try:
            read.future.result()
        except BaseException:
            self._free.append(read.slot)
            raise
        self._slots[page] = read.slot
        self._policy.admit(page)
        self._traffic.disk_bytes += self._at(page).nbytes

    def _stalled(self, flying: dict[Page, Read]) -> BadModel:
        page = next(iter(flying))
        at = self._at(page)
        self._stuck += flying.values()  # their slots may still be written to
        flying.clear()
        return BadModel(
            f"The disk has given nothing for {self._stall_s:.0f} s: expert {page[1]} of layer {page[0]}, "
            f"{at.nbytes:,} bytes at {at.offset:,} of {at.file}. Check the disk, then ask again."
        )

    def _abandon(self, flying: dict[Page, Read]) -> None:
        """Give back the slots of reads that nobody wants any more."""
        for read in flying.values():
            read.future.cancel()
        self._stuck += flying.values()
        flying.clear()
        self._unstick()

    def _unstick(self) -> None:
        self._free += [read.slot for read in self._stuck if read.future.done()]
        self._stuck = [read for read in self._stuck if not read.future.done()]

    # ---- slots ----

    def _take_slots(self, n: int) -> list[int]:
        """Up to n slots: free ones, of guesses that have not begun, of a prompt's pages, of pages that give way."""
        self._unstick()
        slots = [self._free.pop() for _ in range(min(n, len(self._free)))]
        while len(slots) < n and (slot := self._take_back_a_guess()) is not None:
            slots.append(slot)
        for page in [page for page in self._ring if page not in self._pinned][: n - len(slots)]:
            slots.append(self._evict(page))
        if len(slots) < n:
            slots += map(self._evict, self._policy.victims(n - len(slots), self._pinned | self._guessed))
        return slots

    def _must_take_slot(self) -> int:
        """A slot where nothing but guesses and reads that nobody wants any more stand in the way."""
        self._guessed.clear()
        owed = [read.future for read in (*self._stuck, *self._guesses.values())]
        wait(owed, self._stall_s, FIRST_COMPLETED)
        self._landed.extend(page for page, read in self._guesses.items() if read.future.done())
        self._take_in_guesses()
        slots = self._take_slots(1)
        if not slots:
            raise BadModel(
                f"None of the {self.n_slots:,} expert slots came free in {self._stall_s:.0f} s: the disk does not "
                "answer. Check the disk, then ask again."
            )
        return slots[0]

    def resize(self, n_slots: int) -> None:
        """Use this many slots, at least one and at most those given at first; the others' memory goes back."""
        with self._lock:
            n_slots = min(max(1, n_slots), self._ram.n_slots)
            for slot in self._take_slots(max(0, self.n_slots - n_slots)):
                self._ram.give_back(slot)
                self._revoked.append(slot)
            while self.n_slots < n_slots:
                self._free.append(self._revoked.pop())

    def _evict(self, page: Page) -> int:
        self._policy.drop(page)
        if page in self._ring:
            self._ring.remove(page)
        self._guessed.discard(page)
        self._ahead.discard(page)
        return self._slots.pop(page)

    def _take_back_a_guess(self) -> int | None:
        """The slot of the last page to be warmed up whose read has not begun."""
        for page in reversed(self._guesses):
            if page not in self._guessed and self._guesses[page].future.cancel():
                self._ahead.discard(page)
                return self._guesses.pop(page).slot
        return None

    # ---- guesses ----

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Read pages that a later layer will probably ask for, while the disk has nothing better to do."""
        with self._lock:
            pages = [(layer, expert) for expert in experts]
            pages = [page for page in pages if page not in self._slots and page not in self._guesses]
            pages = pages[: max(0, self._ram.n_slots // 4 - len(self._guessed))]
            self._guess(pages)
            self._guessed.update(page for page in pages if page in self._guesses)

    def warm(self, pages: Sequence[Page]) -> None:
        """Fill free slots with these pages, hottest first, in the background, before anybody asks for them.

        They are read in quarters, the hottest first, each in the order of the files.
        """
        with self._lock:
            pages = [page for page in pages if page not in self._slots and page not in self._guesses]
            pages = pages[: len(self._free)]
            quarter = max(1, -(-len(pages) // 4))
            for start in range(0, len(pages), quarter):
                self._guess(sorted(pages[start : start + quarter]))

    def wait_until_warm(self, timeout_s: float | None = None) -> None:
        """Wait for the pages that are being read before anybody asked for them."""
        with self._lock:
            wait([read.future for read in self._guesses.values()], timeout_s)

    def _guess(self, pages: Sequence[Page]) -> None:
        for page, slot in zip(pages, self._take_slots(len(pages)) if pages else (), strict=False):
            self._guess_into(page, slot)

    def _guess_into(self, page: Page, slot: int) -> None:
        guess = Read(self._disk.guess(self._at(page), self._ram.memory(slot)), slot)
        self._guesses[page] = guess
        guess.future.add_done_callback(partial(self._note_landing, page))

    def _note_landing(self, page: Page, _: "Future[None]") -> None:
        self._landed.append(page)  # called by a reader's thread

    def _settle(self, layer: int, wanted: Sequence[Page]) -> None:
        """Take in guesses that have landed, and close the account of those for `layer`."""
        self._take_in_guesses()
        due = {page for page in self._guessed if page[0] == layer}
        if due:
            self._close_account(due, set(wanted))

    def _take_in_guesses(self) -> None:
        """Take in what has landed since."""
        while self._landed:
            page = self._landed.popleft()
            if page in self._guesses and self._guesses[page].future.done():
                self._take_in_guess(page, self._guesses.pop(page))

    def _take_in_guess(self, page: Page, read: Read) -> None:
        try:
            self._take_in(page, read)
        except BadModel:
            self._guessed.discard(page)
            self._ahead.discard(page)  # a bad page is an error for whoever asks for it

    def _close_account(self, due: set[Page], wanted: set[Page]) -> None:
        self._guessed -= due
        useful = len(due & wanted)
        wasted = sum(1 for page in due - wanted if not self._drop_guess(page))
        self._traffic.disk_pages += sum(1 for page in due & wanted if page in self._slots)
        self._traffic.ram_pages -= sum(1 for page in due & wanted if page in self._slots)
        self._traffic.prefetch_useful += useful
        self._traffic.prefetch_wasted += wasted
        if self._gate is not None:
            self._gate.judge(useful, wasted)

    def _drop_guess(self, page: Page) -> bool:
        """Take back a guess that was wrong; False where its read has begun."""
        if page not in self._guesses or not self._guesses[page].future.cancel():
            return False
        self._free.append(self._guesses.pop(page).slot)
        return True

    # ---- a prompt ----

    def note_prompt(self, layer: int, tail: list[list[int]]) -> None:
        """The experts of a prompt's last tokens at `layer`: all of a long prompt that enters the statistics."""
        self._tail[layer] = tail

    def _count_prompt(self) -> None:
        """Count the tail of the last prompt, token by token, before the first step after it."""
        for chosen in zip(*self._tail.values(), strict=False):
            for layer, experts in zip(self._tail, chosen, strict=True):
                self._policy.request(layer, experts)
        self._tail.clear()

    def stream(self, layer: int, experts: Sequence[int]) -> Iterator[list[Arrival]]:
        """Yield lists of arrivals that together are `experts` (ascending) in their order, read ahead of their use.

        A page is valid until the next list is asked for. Raises BadModel where a page is bad.
        """
        with self._lock:
            self._settle(layer, [(layer, expert) for expert in experts])
            waiting = deque((layer, expert) for expert in experts)
            flying: dict[Page, Read] = {}
            most = len(experts) >= MOST * self._n_experts[layer]
            try:
                while waiting:
                    self._pinned = set(waiting)
                    if self._read_ahead(waiting, flying) and most:
                        self._begin_next(layer, len(flying))
                    ready = self._ready(waiting, flying)
                    self._pinned.update(ready)
                    yield self._arrivals(ready)
            finally:
                self._pinned.clear()
                self._abandon(flying)

    def _ready(self, waiting: deque[Page], flying: dict[Page, Read]) -> list[Page]:
        """Take the first pages off `waiting`: at least one, and what has come after it without a gap."""
        ready: list[Page] = []
        while waiting and len(ready) < GROUP:
            page = waiting[0]
            if page in flying:
                if ready and not flying[page].future.done():
                    break
                self._arrive(page, flying)
            elif page in self._slots:
                self._use_in_stream(page)
            else:
                break
            ready.append(waiting.popleft())
        return ready

    def _arrive(self, page: Page, flying: dict[Page, Read]) -> None:
        wait([flying[page].future], self._stall_s)
        if not flying[page].future.done():
            raise self._stalled(flying)
        self._take_in(page, flying.pop(page))
        self._stream_through(page)

    def _use_in_stream(self, page: Page) -> None:
        if page in self._ahead:
            self._ahead.discard(page)
            self._stream_through(page)
        else:
            self._traffic.ram_pages += 1

    def _stream_through(self, page: Page) -> None:
        self._traffic.disk_pages += 1
        self._ring.append(page)
        if len(self._ring) > self._ring_size:
            self._ring.popleft()

    def _begin_next(self, layer: int, n_flying: int) -> None:
        """The disk is done with a layer that wanted nearly all its pages: the next one will too, in file order."""
        following = self._next_layer.get(layer)
        if following is None:
            return
        n_begun = len(self._ahead)
        for page in ((following, expert) for expert in range(self._n_experts[following])):
            if page in self._slots or page in self._guesses:
                continue
            slot = self._ring_slot(n_flying + n_begun)
            if slot is None:
                return
            self._guess_into(page, slot)
            self._ahead.add(page)
            n_begun += 1

    def _read_ahead(self, waiting: deque[Page], flying: dict[Page, Read]) -> bool:
        """Start reading the next missing pages, as many as the ring has slots for; the first one in any case.

        True where all are being read.
        """
        for page in waiting:
            if page in flying or page in self._slots:
                continue
            if page in self._guesses:
                flying[page] = self._claim(page)
                continue
            slot = self._ring_slot(len(flying))
            if slot is None and not flying:
                slot = self._evict_last(waiting)
            if slot is None:
                return False
            flying[page] = self._read(page, slot)
        return True

    def _ring_slot(self, n_flying: int) -> int | None:
        """A slot for a streamed page: a free one, the one of the page streamed longest ago, or one that decode had."""
        self._unstick()
        if self._free:
            return self._free.pop()
        if len(self._ring) + n_flying >= self._ring_size:
            gone = next((page for page in self._ring if page not in self._pinned), None)
            return None if gone is None else self._evict(gone)
        victims = self._policy.victims(1, self._pinned | self._guessed)
        return self._evict(victims[0]) if victims else None

    @property
    def _ring_size(self) -> int:
        return max(1, self.n_slots // RING_SHARE)

    def _evict_last(self, waiting: deque[Page]) -> int | None:
        """Make room for the first missing page by giving up the one in RAM that is needed last; None if it is first."""
        if waiting[0] in self._slots:
            return None
        last = next((page for page in reversed(waiting) if page in self._slots), None)
        return self._must_take_slot() if last is None else self._evict(last)

    def close(self) -> None:
        """Stop reading and give the files back."""
        with self._lock:
            self._disk.close()
