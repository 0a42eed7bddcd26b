"""Slot supply: whose slot is taken first, and whose never."""

import pytest

from localmimo.experts.policy.baselines import Lru, Page
from localmimo.experts.store.slot_supply import RING_SHARE, SlotSupply
from localmimo.experts.tiers.ram_slots import RamSlots
from localmimo.experts.tiers.tiers import RamTier

N = 2 * RING_SHARE  # slots: two of them stream a prompt


class Prefetches:
    """Reads that have not begun, in order, and pages that a router named."""

    def __init__(self) -> None:
        self.waiting: dict[Page, int] = {}
        self.routed: set[Page] = set()

    def cancel_last(self) -> tuple[Page, int] | None:
        return self.waiting.popitem() if self.waiting else None


@pytest.fixture
def slots() -> RamSlots:
    return RamSlots(RamTier(N, 4096), Lru(4, 32))


@pytest.fixture
def supply(slots: RamSlots) -> SlotSupply:
    return SlotSupply(slots, Prefetches(), None, 1.0)  # type: ignore[arg-type]


def fill(slots: RamSlots, n: int) -> None:
    """Hold pages 0 to n - 1 of layer 1, in slots of the same numbers, the first one least worth keeping."""
    for expert, slot in enumerate(slots.take(n)):
        slots.put((1, expert), slot)


def test_free_slots_then_prefetches_then_streamed_pages_then_victims(
    slots: RamSlots, supply: SlotSupply
) -> None:
    fill(slots, N - 3)
    supply._prefetches.waiting = {(2, expert): slots.take(1)[0] for expert in range(2)}
    supply.next_layer = {(2, 0), (2, 1)}
    supply.note_streamed((1, 5))
    assert supply.take(2) == [N - 1, N - 2]
    assert supply.next_layer == {(2, 0)}  # the other one is not read any more
    assert supply.take(3) == [N - 3, 5, 0] and supply.next_layer == set() and not supply.streamed


def test_pages_that_must_stay_are_not_taken(slots: RamSlots, supply: SlotSupply) -> None:
    fill(slots, N)
    supply.pinned = {(1, 0)}
    supply._prefetches.routed = {(1, 1)}
    supply.note_streamed((1, 0))
    assert supply.take(2) == [2, 3] and list(supply.streamed) == [(1, 0)]
    assert len(supply.take(N)) == N - 4 and set(slots) == {(1, 0), (1, 1)}


def test_an_evicted_page_is_known_nowhere(slots: RamSlots, supply: SlotSupply) -> None:
    fill(slots, N)
    supply.note_streamed((1, 3))
    supply._prefetches.routed = {(1, 3)}
    supply.next_layer = {(1, 3)}
    assert supply.evict((1, 3)) == 3
    assert not supply.streamed and not supply._prefetches.routed and not supply.next_layer
    assert (1, 3) not in slots


@pytest.mark.parametrize(("n_free", "n_wanted"), [(0, 3), (2, 3), (3, 3), (5, 3)])
def test_as_many_slots_are_kept_free_as_are_wanted(
    slots: RamSlots, supply: SlotSupply, n_free: int, n_wanted: int
) -> None:
    fill(slots, N - n_free)
    supply.keep_free(n_wanted)
    assert slots.n_free == max(n_free, n_wanted) and len(slots) == N - slots.n_free


def test_a_prompt_streams_through_its_ring_and_no_more(slots: RamSlots, supply: SlotSupply) -> None:
    fill(slots, N - 1)
    assert supply.take_for_stream(0) == N - 1  # the free one
    slots.put((2, 0), N - 1)
    supply.note_streamed((2, 0))
    assert supply.take_for_stream(0) == 0  # a victim: the ring has room for one more
    slots.put((2, 1), 0)
    supply.note_streamed((2, 1))
    assert supply.take_for_stream(0) == N - 1  # the oldest of the ring
    supply.pinned = {(2, 1)}
    assert supply.take_for_stream(1) is None  # the ring is full of what is in use
    assert len([page for page in slots if page[0] == 1]) == N - 2


def test_what_was_prefetched_for_the_next_layer_is_no_victim(slots: RamSlots, supply: SlotSupply) -> None:
    fill(slots, N)
    supply.next_layer = {(1, 0)}
    assert supply.take_for_stream(0) == 1
    supply.next_layer = {(1, 0), (1, 2)}
    assert supply.take_for_stream(0) is None


def test_the_ring_remembers_as_many_pages_as_it_has_slots(slots: RamSlots, supply: SlotSupply) -> None:
    fill(slots, N)
    for expert in range(4):
        supply.note_streamed((1, expert))
    assert list(supply.streamed) == [(1, 2), (1, 3)]


def test_the_page_that_is_needed_last_makes_way_for_the_first(slots: RamSlots, supply: SlotSupply) -> None:
    fill(slots, N)
    assert supply.take_from_last([(1, 0), (1, 1)]) is None
    assert supply.take_from_last([(3, 0), (1, 4), (1, 7), (3, 9)]) == 7
