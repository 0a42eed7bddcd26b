"""Fetching for a decode step: a few pages of a layer, those in RAM at once, the others as they are read.

Knows pages and slots; nothing of tokens, nor of what a page contains.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from localmimo.experts.policy.baselines import Page, Policy
from localmimo.experts.store.counters import PageCounters
from localmimo.experts.store.page_reads import PageReads
from localmimo.experts.store.prefetch import PrefetchReads
from localmimo.experts.store.slot_supply import SlotSupply
from localmimo.experts.tiers.ram_slots import RamSlots


class StepFetch:
    """Gives the pages that a step needs, in the order in which they can be had."""

    def __init__(
        self,
        policy: Policy,
        slots: RamSlots,
        supply: SlotSupply,
        prefetches: PrefetchReads,
        counters: PageCounters,
        new_reads: Callable[[], PageReads],
        n_kept_free: Callable[[], int],
    ) -> None:
        """n_kept_free: slots to leave free for the next layer's first reads."""
        self._policy = policy
        self._slots = slots
        self._supply = supply
        self._prefetches = prefetches
        self._counters = counters
        self._new_reads = new_reads
        self._n_kept_free = n_kept_free

    def pages(self, layer: int, experts: Sequence[int], pages: Sequence[Page]) -> Iterator[list[Page]]:
        """Yield lists of `pages`: first those in RAM (or none), then the others as they arrive.

        They stay until the next list is asked for. experts: all that the step uses, for the policy, those on a GPU
        included. Raises BadModel where a page is bad.
        """
        held = [page for page in pages if page in self._slots]
        missing = deque(page for page in pages if page not in self._slots)
        reads = self._new_reads()
        try:
            self._supply.pinned = set(held)
            self._take_over_prefetched(missing, reads)
            _read_into(self._slots.take(len(missing)), missing, reads)
            self._policy.request(layer, experts)  # the disk works meanwhile
            self._begin(missing, reads)
            self._count_held(held)
            yield held
            while reads or missing:
                self._supply.pinned.clear()
                self._begin(missing, reads)
                landed = reads.wait_for_any()
                self._supply.pinned = set(landed)
                yield landed
            self._supply.keep_free(self._n_kept_free())
        finally:
            self._supply.pinned.clear()
            reads.abandon()

    def _take_over_prefetched(self, missing: deque[Page], reads: PageReads) -> None:
        for page in [page for page in missing if page in self._prefetches]:
            self._supply.next_layer.discard(page)
            reads.take_over(page)
            missing.remove(page)

    def _begin(self, missing: deque[Page], reads: PageReads) -> None:
        """Begin to read as many missing pages as slots can be had for; one in any case."""
        slots = self._supply.take(len(missing)) if missing else []
        if missing and not slots and not reads and not self._supply.pinned:
            slots = [self._supply.must_take()]
        _read_into(slots, missing, reads)

    def _count_held(self, held: Sequence[Page]) -> None:
        self._counters.ram_pages += len(held)
        for page in held:
            self._supply.streamed.pop(page, None)  # decode uses it: from now on the policy decides


def _read_into(slots: Sequence[int], missing: deque[Page], reads: PageReads) -> None:
    for slot in slots:
        reads.begin(missing.popleft(), slot)
