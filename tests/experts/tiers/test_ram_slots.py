"""RAM slots: which are free, held, still being written to, or the system's."""

import pytest
import torch

from localmimo.experts.policy.baselines import Lru
from localmimo.experts.tiers.io_threads import State, Task
from localmimo.experts.tiers.ram_slots import RamSlots, Read
from localmimo.experts.tiers.tiers import RamTier


class Tier(RamTier):
    """Remembers what was given back to the system."""

    def __init__(self, n_slots: int) -> None:
        super().__init__(n_slots, 4096)
        self.given_back: list[int] = []

    def give_back(self, slot: int) -> None:
        super().give_back(slot)
        self.given_back.append(slot)


@pytest.fixture
def tier() -> Tier:
    return Tier(4)


@pytest.fixture
def slots(tier: Tier) -> RamSlots:
    return RamSlots(tier, Lru(2, 8))


def read(slot: int) -> Read:
    return Read(Task(lambda: None, demanded=True, on_end=None), slot)


def test_slots_are_taken_while_there_are_any(slots: RamSlots) -> None:
    assert slots.take(3) == [0, 1, 2] and slots.n_free == 1
    assert slots.take(3) == [3] and slots.take(1) == []
    slots.release(2)
    assert slots.take(1) == [2]


def test_an_evicted_page_is_forgotten_and_named_no_more(slots: RamSlots) -> None:
    for expert, slot in enumerate(slots.take(3)):
        slots.memory(slot)[:1] = bytes([expert])
        slots.put((1, expert), slot)
    assert len(slots) == 3 and slots.tensor((1, 2))[0] == 2
    assert slots.evict((1, 0)) == 0
    assert (1, 0) not in slots and list(slots) == [(1, 1), (1, 2)]
    assert slots.victims(3, [(1, 2)]) == [(1, 1)]


def test_the_slot_of_an_unneeded_read_comes_back_when_the_read_is_over(slots: RamSlots) -> None:
    first, second = (read(slot) for slot in slots.take(4)[:2])
    slots.release_when_done([first, second])
    assert slots.take(4) == [] and slots.pending == [first.task, second.task]
    second.task.state = State.OVER
    assert slots.take(4) == [1] and slots.pending == [first.task]
    first.task.state = State.CANCELLED
    assert slots.take(4) == [0] and slots.pending == []


def test_revoked_slots_are_the_systems_until_they_are_restored(slots: RamSlots, tier: Tier) -> None:
    slots.memory(2)[:3] = b"abc"
    slots.revoke(slots.take(3))
    assert tier.given_back == [0, 1, 2] and torch.count_nonzero(tier.tensor(2)) == 0
    assert (slots.n_slots, slots.n_free, slots.n_accounted) == (1, 1, 4)
    slots.restore(2)
    assert (slots.n_slots, slots.n_free) == (3, 3)
    slots.restore(9)
    assert (slots.n_slots, slots.n_free) == (4, 4) and sorted(slots.take(9)) == [0, 1, 2, 3]


class Locks:
    """The addresses that are locked for a GPU."""

    def __init__(self) -> None:
        self.locked: set[int] = set()

    def lock(self, address: int, nbytes: int) -> None:
        self.locked.add(address)

    def unlock(self, address: int) -> None:
        self.locked.remove(address)


def test_memory_that_goes_back_to_the_system_is_not_locked_for_the_gpu() -> None:
    locks = Locks()
    slots = RamSlots(RamTier(4, 4096, locks), Lru(2, 8))  # type: ignore[arg-type]
    for slot in slots.take(2):
        slots.memory(slot)[:1] = b"x"
        slots.release(slot)
    assert len(locks.locked) == 2
    slots.revoke(slots.take(2))
    assert not locks.locked
