"""RAM slots: which page is in which slot, which slots are free, in use by a read, or returned to the system.

Knows pages as names and slots as numbers; not how a page is read or who asks for it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from localmimo.experts.policy.baselines import Page, Policy
from localmimo.experts.tiers.io_threads import Task
from localmimo.experts.tiers.tiers import RamTier
from quant.formats.page import PageLayout


@dataclass(frozen=True, slots=True)
class Read:
    """A read under way, or waiting its turn, into a slot."""

    task: Task
    slot: int


class Arrival(NamedTuple):  # made for every page of every token
    """A page that can be used now."""

    expert: int
    layout: PageLayout
    page: Tensor  # uint8 [slot bytes]


class RamSlots:
    """The pages held in a RAM tier."""

    def __init__(self, ram: RamTier, policy: Policy) -> None:
        self._ram = ram
        self._policy = policy
        self._held: dict[Page, int] = {}
        self._free = list(range(ram.n_slots - 1, -1, -1))
        self._revoked: list[int] = []  # their memory is the system's
        self._pending: list[
            Read
        ] = []  # reads that nobody waits for any more: their slots may still be written to

    def __contains__(self, page: Page) -> bool:
        return page in self._held

    def __iter__(self) -> Iterator[Page]:
        return iter(self._held)

    def __len__(self) -> int:
        """Pages held."""
        return len(self._held)

    @property
    def n_slots(self) -> int:
        """Slots in use: fewer than there are while the system is short of memory."""
        return self._ram.n_slots - len(self._revoked)

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_accounted(self) -> int:
        """Slots that are held, free, owed or revoked: all but those of reads under way."""
        return len(self._held) + len(self._free) + len(self._pending) + len(self._revoked)

    def memory(self, slot: int) -> memoryview:
        """A slot's bytes, to read into."""
        return self._ram.memory(slot)

    def tensor(self, page: Page) -> Tensor:
        """A held page as uint8 [slot bytes]."""
        return self._ram.tensor(self._held[page])

    def data(self, slot: int) -> Tensor:
        """What lies in a slot that is the caller's, as uint8 [slot bytes]."""
        return self._ram.tensor(slot)

    def put(self, page: Page, slot: int) -> None:
        """`page` lies in `slot` now."""
        self._held[page] = slot
        self._policy.admit(page)

    def evict(self, page: Page) -> int:
        """Forget a page; its slot is the caller's."""
        self._policy.drop(page)
        return self._held.pop(page)

    def release(self, slot: int) -> None:
        """A slot is free again."""
        self._free.append(slot)

    def take(self, n: int) -> list[int]:
        """Up to n free slots."""
        self._collect()
        return [self._free.pop() for _ in range(min(n, len(self._free)))]

    def victims(self, n: int, keep: Collection[Page]) -> list[Page]:
        """Up to n pages that should give way, none of `keep`."""
        return self._policy.victims(n, keep)

    def release_when_done(self, reads: Collection[Read]) -> None:
        """Nobody wants these reads any more: their slots come back when they are over."""
        self._pending += reads
        self._collect()

    @property
    def pending(self) -> list[Task]:
        """Reads that nobody wants, under way."""
        return [read.task for read in self._pending]

    def _collect(self) -> None:
        if self._pending:
            self._free += [read.slot for read in self._pending if read.task.done()]
            self._pending = [read for read in self._pending if not read.task.done()]

    def revoke(self, slots: Collection[int]) -> None:
        """Give the memory of slots that the caller has taken back to the system."""
        for slot in slots:
            self._ram.give_back(slot)
            self._revoked.append(slot)

    def restore(self, n: int) -> None:
        """Use up to n revoked slots again."""
        for _ in range(min(n, len(self._revoked))):
            self._free.append(self._revoked.pop())
