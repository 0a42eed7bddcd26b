"""The one way to get a slot of RAM: free slots first, then those whose pages are worth least.

Knows which pages must stay now, and which were only streamed through; not how a page is read, nor who asks.
"""

from collections.abc import Sequence
from itertools import islice

from localmimo.errors import BadModel
from localmimo.experts.policy.baselines import Page
from localmimo.experts.store.prefetch import PrefetchReads
from localmimo.experts.tiers.gpu_slots import GpuSlots
from localmimo.experts.tiers.ram_slots import RamSlots

RING_SHARE = 8  # one slot in so many is used to stream a prompt


class SlotSupply:
    """Gives out slots, which are then the caller's, and takes their pages out of RAM."""

    def __init__(
        self, slots: RamSlots, prefetches: PrefetchReads, gpu: GpuSlots | None, stall_s: float
    ) -> None:
        self._slots = slots
        self._prefetches = prefetches
        self._gpu = gpu
        self._stall_s = stall_s
        self.pinned: set[Page] = set()  # in use, or wanted by the request that runs
        self.streamed: dict[Page, None] = {}  # pages that the last prompts streamed through, oldest first
        self.next_layer: set[Page] = set()  # prefetched for the layer that a prompt will stream through next

    # ---- for a decode step ----

    def take(self, n: int) -> list[int]:
        """Up to n slots: free ones, of prefetches that have not begun, of streamed pages, of the policy's victims."""
        slots = self._slots.take(n)
        while len(slots) < n and (prefetch := self._prefetches.cancel_last()) is not None:
            self.next_layer.discard(prefetch[0])
            slots.append(prefetch[1])
        if len(slots) < n:
            kept = self._kept()
            streamed = list(islice((page for page in self.streamed if page not in kept), n - len(slots)))
            slots += map(self.evict, streamed)
            slots += map(self.evict, self._slots.victims(n - len(slots), kept) if len(slots) < n else ())
        return slots

    def must_take(self) -> int:
        """A slot where only prefetches and unneeded reads are in the way: wait for them.

        Raises BadModel where none comes free.
        """
        self._prefetches.routed.clear()
        self.release_uploaded()
        self._prefetches.wait_for_slot(self._stall_s)
        slots = self.take(1)
        if not slots:
            raise BadModel(
                f"None of the {self._slots.n_slots:,} expert slots came free in {self._stall_s:.0f} s: the disk does "
                "not answer. Check the disk, then ask again."
            )
        return slots[0]

    def keep_free(self, n: int) -> None:
        """See to it that n slots are free, which the first reads of the next layer then need not wait for."""
        n_missing = n - self._slots.n_free
        if n_missing > 0:
            self._release(self._slots.victims(n_missing, self._kept()))

    def evict(self, page: Page) -> int:
        """Take a page out of RAM; its slot is the caller's."""
        self.streamed.pop(page, None)
        self._prefetches.routed.discard(page)
        self.next_layer.discard(page)
        return self._slots.evict(page)

    def release_uploaded(self) -> None:
        """Free the slots of pages that have arrived on the GPU."""
        self._release(() if self._gpu is None else self._gpu.uploaded())

    def _release(self, pages: Sequence[Page]) -> None:
        for page in pages:
            self._slots.release(self.evict(page))

    def _kept(self) -> set[Page]:
        """Pages in RAM that must stay now."""
        return self.pinned.union(self._prefetches.routed, () if self._gpu is None else self._gpu.uploading)

    # ---- for a prompt ----

    def take_for_stream(self, n_in_flight: int) -> int | None:
        """A slot for a streamed page: a free one, that of the page streamed longest ago, or, up to the ring's size, a
        victim's; None where the ring is full of pages that are in use."""
        if slots := self._slots.take(1):
            return slots[0]
        kept = self._kept()
        if len(self.streamed) + len(self.next_layer) + n_in_flight >= self._ring_size:
            oldest = next((page for page in self.streamed if page not in kept), None)
            return None if oldest is None else self.evict(oldest)
        victims = self._slots.victims(1, kept | self.next_layer)
        return self.evict(victims[0]) if victims else None

    def take_from_last(self, waiting: Sequence[Page]) -> int | None:
        """A slot for the first page of `waiting`, from that in RAM which is needed last; None if the first is there."""
        if waiting[0] in self._slots:
            return None
        last = next((page for page in reversed(waiting) if page in self._slots), None)
        return self.must_take() if last is None else self.evict(last)

    def note_streamed(self, page: Page) -> None:
        """A prompt has used this page, which it brought to RAM itself."""
        self.streamed[page] = None
        if len(self.streamed) > self._ring_size:
            del self.streamed[next(iter(self.streamed))]

    @property
    def _ring_size(self) -> int:
        return max(1, self._slots.n_slots // RING_SHARE)
