"""ExpertStore: the only owner of expert pages in memory. Fetches them from disk into slots, evicts, counts.

Knows pages, slots and bytes; nothing of tokens or of what an expert computes.

Two ways to ask. `fetch` serves a decode step: a few pages of a layer, those in RAM at once, the others as they land.
`stream` serves a prompt: many pages of a layer in the order of the file, each read once into a few slots that go
round, so that a long prompt does not push out what decode had kept.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise

from torch import Tensor

from localmimo.errors import BadModel
from localmimo.experts.policy.baselines import Page, Policy
from localmimo.experts.store.counters import PageCounters
from localmimo.experts.store.deferred_counts import DeferredCounts
from localmimo.experts.store.prefetch import PrefetchReads
from localmimo.experts.store.prefetch_gate import PrefetchGate
from localmimo.experts.tiers.gpu_slots import GpuSlots
from localmimo.experts.tiers.pinning import Pinning
from localmimo.experts.tiers.ram_slots import Arrival, RamSlots, Read
from localmimo.experts.tiers.tiers import DiskTier, RamTier, stalled
from localmimo.limits import N_READERS
from quant import Pack
from quant.formats.page import PageLayout
from quant.pack.pack import PageAt, experts_of

STALL_S = 60.0  # a disk that gives nothing for so long is taken for broken
GROUP = 16  # pages of a prompt's stream handed over at a time
RING_SHARE = 8  # one slot in so many is used to stream a prompt
GUESS_SHARE = 4  # and one in so many holds a router's guesses at the most
FREE_SHARE = 64  # one in so many, as many as there are readers at the most, is free when a layer asks
MOST = 0.9  # a prompt that wants so many of a layer's pages will want those of the next layer too


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
        gpu: GpuSlots | None = None,
        pinning: Pinning | None = None,
    ) -> None:
        self._pack = pack
        self.gpu = gpu
        self._n_experts = experts_of(pack)
        self._next_layer = dict(pairwise(self._n_experts))
        self._one_layout = next(iter(pack.layouts.values())) if len(pack.layouts) == 1 else None
        self._full = n_slots
        self._disk = DiskTier(trust=trust)
        self._policy = policy
        self._slots = RamSlots(RamTier(n_slots, slot_bytes, pinning), policy)
        self._guesses = PrefetchReads(self._disk, self._slots)
        self._gate = PrefetchGate() if prefetch and 4 <= n_slots < pack.n_pages else None
        self._pinned: set[Page] = set()
        self._ring: dict[Page, None] = {}  # pages that the last prompts streamed through, oldest first
        self._ahead: set[Page] = set()  # guesses for the layer that a prompt will stream through next
        self._tail: dict[int, list[list[int]]] = {}
        self._stall_s = stall_s
        self._layer = -1  # of the last step's request
        self._turned_s = time.perf_counter()
        self._traffic = PageCounters()
        self.resident = DeferredCounts(policy, self._traffic)
        self.lock = threading.RLock() if gpu is None else gpu.lock  # held: no page moves for others' sake

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
        """Whether guesses are wanted now."""
        return self._gate is not None and self._gate.open

    @property
    def traffic(self) -> PageCounters:
        """What was asked so far."""
        if self.resident.waiting:
            with self.lock:
                self.resident.count()
        self._traffic.read_s = self._disk.busy_s
        return self._traffic

    def where(self) -> dict[Page, str]:
        """The tier of every page that is not on disk alone."""
        with self.lock:
            return dict.fromkeys(self._slots, "ram") | dict.fromkeys(self.gpu or (), "gpu")

    # ---- a decode step ----

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[list[Arrival]]:
        """Yield lists of arrivals: first the pages in RAM (or none), while the others are read, then as they land.

        A page is valid until the next list is asked for. Pages on the GPU are left out: `gpu` computes them.
        Raises BadModel where a page is bad.
        """
        with self.lock:
            self._count_prompt()
            self.resident.count()
            here = experts if self.gpu is None else self.without_gpu(layer, experts)
            pages = [(layer, expert) for expert in here]
            self._settle(layer, pages)
            yield from self._serve(layer, experts, pages)

    def _serve(self, layer: int, experts: Sequence[int], pages: list[Page]) -> Iterator[list[Arrival]]:
        held = [page for page in pages if page in self._slots]
        missing = deque(page for page in pages if page not in self._slots)
        flying: dict[Page, Read] = {}
        if self._gate is not None:
            self._gate.step(layer, bool(missing))
        try:
            self._pinned = set(held)
            self._claim_guessed(missing, flying)
            self._read_into(self._slots.take(len(missing)), missing, flying)
            self._policy.request(layer, experts)  # the disk works while it thinks
            self._start_reads(missing, flying)
            self._hit(held)
            yield self._arrivals(held)
            while flying or missing:
                self._pinned.clear()
                self._start_reads(missing, flying)
                yield self._arrivals(self._land(flying))
            self._keep_some_free()
        finally:
            self._pinned.clear()
            self._abandon(flying)

    def _keep_some_free(self) -> None:
        """Slots for the first reads of the next layer, which then need not wait for the policy."""
        n = min(N_READERS, self.n_slots // FREE_SHARE) - self._slots.n_free
        if n > 0 and self.n_slots < self._pack.n_pages:
            for slot in map(self._evict, self._slots.victims(n, self._kept())):
                self._slots.give(slot)

    def _hit(self, held: Sequence[Page]) -> None:
        self._traffic.ram_pages += len(held)
        for page in held:
            self._ring.pop(page, None)  # decode uses it: now the policy decides

    def _arrivals(self, pages: Sequence[Page]) -> list[Arrival]:
        return [Arrival(page[1], self._layout(page), self._tensor(page)) for page in pages]

    def _layout(self, page: Page) -> PageLayout:
        return self._one_layout or self._pack.layouts[self._at(page).codec]

    def _tensor(self, page: Page) -> Tensor:
        if self.gpu is not None and page in self.gpu:
            return self.gpu.tensor(page)
        return self._slots.tensor(page)

    def _on_gpu(self, page: Page) -> bool:
        return self.gpu is not None and page in self.gpu

    def _at(self, page: Page) -> PageAt:
        return self._pack.page_at(*page)

    def _start_reads(self, missing: deque[Page], flying: dict[Page, Read]) -> None:
        """Start reading as many missing pages as slots can be had for."""
        slots = self._take_slots(len(missing)) if missing else []
        if missing and not slots and not flying and not self._pinned:
            slots = [self._must_take_slot()]
        self._read_into(slots, missing, flying)

    def _claim_guessed(self, missing: deque[Page], flying: dict[Page, Read]) -> None:
        for page in [page for page in missing if page in self._guesses]:
            flying[page] = self._claim(page)
            missing.remove(page)

    def _read_into(self, slots: Sequence[int], missing: deque[Page], flying: dict[Page, Read]) -> None:
        for slot in slots:
            page = missing.popleft()
            flying[page] = self._read(page, slot)

    def _read(self, page: Page, slot: int) -> Read:
        return Read(self._disk.read(self._at(page), self._slots.memory(slot)), slot)

    def _claim(self, page: Page) -> Read:
        """A guessed page is needed now: wait for its read if that has begun, else read it before all guesses."""
        self._ahead.discard(page)
        guess = self._guesses.claim(page)
        return self._read(page, guess.slot) if guess.task.cancelled() else guess

    def _land(self, flying: dict[Page, Read]) -> list[Page]:
        """Wait for at least one read; take in, pinned, all that have come."""
        if not self._disk.wait([read.task for read in flying.values()], self._stall_s):
            raise self._stalled(next(iter(flying)))
        landed = sorted(page for page, read in flying.items() if read.task.done())
        for page in landed:
            self._take_in(page, flying.pop(page))
        self._pinned = set(landed)
        return landed

    def _take_in(self, page: Page, read: Read) -> None:
        try:
            read.task.result()
        except BaseException:
            self._slots.give(read.slot)
            raise
        self._slots.put(page, read.slot)
        self._traffic.disk_pages += 1
        self._traffic.disk_bytes += self._at(page).nbytes

    def _abandon(self, flying: dict[Page, Read]) -> None:
        """Give back the slots of reads that nobody wants any more, when they are over."""
        for read in flying.values():
            self._disk.cancel(read.task)
        self._slots.owe(flying.values())

    def _stalled(self, page: Page) -> BadModel:
        return stalled(*page, self._at(page), self._stall_s)

    # ---- the GPU's part ----

    def turn(self, layer: int) -> None:
        """A step comes to `layer`. Where a new token begins, pages may go to the GPU."""
        if layer <= self._layer and self.gpu is not None:
            self._count_prompt()
            self.resident.count()
            self._let_go()
            now = time.perf_counter()
            self._traffic.uploads += self.gpu.turn(self._slots, now - self._turned_s)
            self._turned_s = now
        self._layer = layer

    def _let_go(self) -> None:
        """Free the slots of pages that have arrived on the GPU."""
        for page in () if self.gpu is None else self.gpu.left():
            self._slots.give(self._evict(page))

    def without_gpu(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of the experts that do not lie on the GPU; the others are counted as found there."""
        elsewhere = [expert for expert in experts if not self._on_gpu((layer, expert))]
        self._traffic.gpu_pages += len(experts) - len(elsewhere)
        return elsewhere

    def lift(self, pages: Sequence[Page]) -> int:
        """Bring pages to free slots of the GPU before anybody asks for them; how many were read."""
        assert self.gpu is not None
        with self.lock:
            pages = [page for page in self._absent(pages) if self.gpu.takes(page)][: self.gpu.n_free]
            n, n_bytes = self._guesses.lift({page: self._at(page) for page in pages}, self.gpu, self._stall_s)
            self._traffic.disk_bytes += n_bytes
            return n

    # ---- slots ----

    def _take_slots(self, n: int) -> list[int]:
        """Up to n slots: free ones, of guesses that have not begun, of a prompt's pages, of pages that give way."""
        slots = self._slots.take(n)
        while len(slots) < n and (guess := self._guesses.take_back()) is not None:
            self._ahead.discard(guess[0])
            slots.append(guess[1])
        if len(slots) < n:
            kept = self._kept()
            streamed = list(islice((page for page in self._ring if page not in kept), n - len(slots)))
            slots += map(self._evict, streamed)
            slots += map(self._evict, self._slots.victims(n - len(slots), kept) if len(slots) < n else ())
        return slots

    def _kept(self) -> set[Page]:
        """Pages in RAM that must not give way now."""
        return self._pinned.union(self._guesses.routed, () if self.gpu is None else self.gpu.leaving)

    def _must_take_slot(self) -> int:
        """A slot where nothing but guesses and reads that nobody wants any more stand in the way."""
        self._guesses.routed.clear()
        self._let_go()
        self._disk.wait([*self._slots.owed, *self._guesses.tasks], self._stall_s)
        self._guesses.note_all_done()
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
        with self.lock:
            n_slots = min(max(1, n_slots), self._full)
            self._slots.revoke(self._take_slots(max(0, self.n_slots - n_slots)))
            self._slots.restore(n_slots - self.n_slots)

    def _evict(self, page: Page) -> int:
        self._ring.pop(page, None)
        self._guesses.routed.discard(page)
        self._ahead.discard(page)
        return self._slots.evict(page)

    # ---- guesses ----

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Read pages that a later layer will probably ask for, while the disk has nothing better to do."""
        with self.lock:
            room = max(0, self._full // GUESS_SHARE - len(self._guesses.routed))
            pages = self._absent((layer, expert) for expert in experts)[:room]
            for page, slot in zip(pages, self._take_slots(len(pages)), strict=False):
                self._guesses.begin(page, self._at(page), slot)
                self._guesses.routed.add(page)

    def warm(self, pages: Sequence[Page]) -> None:
        """Fill free slots with these pages, hottest first, in the background, before anybody asks for them.

        They are read in quarters, the hottest first, each in the order of the files.
        """
        with self.lock:
            pages = self._absent(pages)[: self._slots.n_free]
            quarter = max(1, -(-len(pages) // 4))
            order = [page for i in range(0, len(pages), quarter) for page in sorted(pages[i : i + quarter])]
            for page, slot in zip(order, self._slots.take(len(order)), strict=False):
                self._guesses.begin(page, self._at(page), slot)

    def wait_until_warm(self, timeout_s: float | None = None) -> None:
        """Wait for the pages that are being read before anybody asked for them."""
        with self.lock:
            self._disk.wait(self._guesses.tasks, timeout_s, every=True)

    def _absent(self, pages: Iterable[Page]) -> list[Page]:
        return [
            page for page in pages if not (page in self._slots or page in self._guesses or self._on_gpu(page))
        ]

    def _settle(self, layer: int, wanted: Sequence[Page]) -> None:
        """Take in guesses that have landed, and close the account of the router's guesses for `layer`."""
        self._take_in_guesses()
        if due := self._guesses.due(layer):
            self._close_account(due, due.intersection(wanted))

    def _take_in_guesses(self) -> None:
        for page in self._guesses.landed():
            self._traffic.disk_bytes += self._at(page).nbytes

    def _close_account(self, due: set[Page], useful: set[Page]) -> None:
        """Count what the guesses were worth. A right one that is in RAM already was still read from disk."""
        n_wasted = sum(1 for page in due - useful if not self._guesses.drop(page))
        n_there = sum(1 for page in useful if page in self._slots)
        self._traffic.disk_pages += n_there
        self._traffic.ram_pages -= n_there
        self._traffic.prefetch_useful += len(useful)
        self._traffic.prefetch_wasted += n_wasted
        if self._gate is not None:
            self._gate.judge(len(useful), n_wasted)

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

        Pages on the GPU are yielded too, as they lie there. A page is valid until the next list is asked for.
        Raises BadModel where a page is bad.
        """
        with self.lock:
            waiting = deque((layer, expert) for expert in experts)
            self._settle(layer, waiting)
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
                if ready and not flying[page].task.done():
                    break
                self._arrive(page, flying)
            elif page in self._slots:
                self._use_in_stream(page)
            elif self._on_gpu(page):
                self._traffic.gpu_pages += 1
            else:
                break
            ready.append(waiting.popleft())
        return ready

    def _arrive(self, page: Page, flying: dict[Page, Read]) -> None:
        if not self._disk.wait([flying[page].task], self._stall_s):
            raise self._stalled(page)
        self._take_in(page, flying.pop(page))
        self._stream_through(page)

    def _use_in_stream(self, page: Page) -> None:
        if page not in self._ahead:
            self._traffic.ram_pages += 1
            return
        self._ahead.discard(page)
        self._traffic.disk_pages += 1
        self._stream_through(page)

    def _stream_through(self, page: Page) -> None:
        self._ring[page] = None
        if len(self._ring) > self._ring_size:
            del self._ring[next(iter(self._ring))]

    def _read_ahead(self, waiting: deque[Page], flying: dict[Page, Read]) -> bool:
        """Start reading the next missing pages, as many as the ring has slots for; the first one in any case.

        True where all are being read.
        """
        for page in waiting:
            if page in flying or page in self._slots or self._on_gpu(page):
                continue
            if page in self._guesses:
                flying[page] = self._claim(page)
                continue
            slot = self._ring_slot(len(flying))
            if slot is None and not flying:
                slot = self._evict_last(waiting)
            if slot is None:
                return False
            self._ahead.discard(page)
            flying[page] = self._read(page, slot)
        return True

    def _begin_next(self, layer: int, n_flying: int) -> None:
        """The disk is done with a layer that wanted nearly all its pages: the next one will too, in file order."""
        following = self._next_layer.get(layer)
        if following is None:
            return
        for page in self._absent((following, expert) for expert in range(self._n_experts[following])):
            slot = self._ring_slot(n_flying)
            if slot is None:
                return
            self._guesses.begin(page, self._at(page), slot)
            self._ahead.add(page)

    def _ring_slot(self, n_flying: int) -> int | None:
        """A slot for a streamed page: a free one, the one of the page streamed longest ago, or one that decode had."""
        if slots := self._slots.take(1):
            return slots[0]
        kept = self._kept()
        if len(self._ring) + len(self._ahead) + n_flying >= self._ring_size:
            gone = next((page for page in self._ring if page not in kept), None)
            return None if gone is None else self._evict(gone)
        victims = self._slots.victims(1, kept | self._ahead)
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
        with self.lock:
            self._disk.close()
