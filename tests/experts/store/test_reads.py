"""Reads on demand and ahead: each page that arrives gets its slot, each slot of a read that failed or was cancelled
comes back; with a disk whose reads end when the test says so."""

from collections.abc import Callable, Collection
from types import SimpleNamespace

import pytest
import torch

from localmimo.errors import BadModel
from localmimo.experts.policy.baselines import Lru, Page
from localmimo.experts.store.counters import PageCounters
from localmimo.experts.store.deferred_counts import DeferredCounts
from localmimo.experts.store.page_reads import PageReads
from localmimo.experts.store.prefetch import PrefetchReads
from localmimo.experts.tiers.io_threads import State, Task
from localmimo.experts.tiers.ram_slots import RamSlots
from localmimo.experts.tiers.tiers import RamTier

NBYTES = 100
A, B, C, D = ((2, expert) for expert in range(4))


class Disk:
    """Remembers its tasks by page."""

    def __init__(self) -> None:
        self.tasks: dict[Page, Task] = {}

    def read(self, at: SimpleNamespace, into: memoryview) -> Task:
        self.tasks[at.page] = task = Task(lambda: None, demanded=True, on_end=None)
        return task

    def prefetch(self, at: SimpleNamespace, into: memoryview, on_end: Callable[[], None]) -> Task:
        self.tasks[at.page] = task = Task(lambda: None, demanded=False, on_end=on_end)
        return task

    def cancel(self, task: Task) -> bool:
        if task.state is State.WAITING:
            task.state = State.CANCELLED
        return task.cancelled()

    def wait(self, tasks: Collection[Task], timeout_s: float, *, every: bool = False) -> bool:
        return any(task.done() for task in tasks)

    def begin(self, page: Page) -> None:
        self.tasks[page].state = State.RUNNING

    def end(self, page: Page, error: Exception | None = None) -> None:
        task = self.tasks[page]
        task.state, task.error = State.OVER, error
        if task.on_end is not None:
            task.on_end()


class Gate:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def judge(self, useful: int, wasted: int) -> None:
        self.told.append((useful, wasted))


class Store:
    """Four slots, and reads into them."""

    def __init__(self) -> None:
        pack = SimpleNamespace(
            page_at=lambda layer, expert: SimpleNamespace(page=(layer, expert), nbytes=NBYTES)
        )
        self.disk, self.gate, self.counters = Disk(), Gate(), PageCounters()
        self.slots = RamSlots(RamTier(4, 4096), Lru(4, 8))
        self.ahead = PrefetchReads(pack, self.disk, self.slots, self.counters, self.gate)  # type: ignore[arg-type]
        self.reads = PageReads(pack, self.disk, self.slots, self.ahead, self.counters, 1.0)  # type: ignore[arg-type]

    def slot(self) -> int:
        return self.slots.take(1)[0]


@pytest.fixture
def store() -> Store:
    return Store()


def test_a_page_that_arrives_is_held_and_counted(store: Store) -> None:
    for page in (B, A, C):
        store.reads.begin(page, store.slot())
    store.disk.end(B)
    store.disk.end(A)
    assert store.reads.wait_for_any() == [A, B]
    assert A in store.slots and B in store.slots and C not in store.slots and list(store.reads) == [C]
    assert (store.counters.disk_pages, store.counters.disk_bytes) == (2, 2 * NBYTES)


def test_the_slot_of_a_bad_page_is_free_again(store: Store) -> None:
    store.reads.begin(A, store.slot())
    store.disk.end(A, BadModel("It is bad."))
    with pytest.raises(BadModel, match="bad"):
        store.reads.wait_for(A)
    assert store.slots.n_free == 4 and A not in store.slots and not store.reads
    assert store.counters.disk_pages == 0


def test_abandoned_reads_are_cancelled_where_they_have_not_begun(store: Store) -> None:
    for page in (A, B):
        store.reads.begin(page, store.slot())
    store.disk.begin(A)
    store.reads.abandon()
    assert not store.reads and store.slots.n_free == 3
    assert store.disk.tasks[B].cancelled() and not store.disk.tasks[A].cancelled()
    store.disk.end(A)
    assert len(store.slots.take(4)) == 4


@pytest.mark.parametrize("begun", [True, False])
def test_a_prefetched_page_that_is_needed_is_read_once_and_at_once(store: Store, begun: bool) -> None:
    store.ahead.begin(A, store.slot())
    ahead = store.disk.tasks[A]
    if begun:
        store.disk.begin(A)
    store.reads.take_over(A)
    assert A in store.reads and A not in store.ahead
    assert (store.disk.tasks[A] is ahead) == begun and store.disk.tasks[A].demanded != begun


def test_useful_and_wasted_prefetches_are_told_apart(store: Store) -> None:
    for page in (A, B, C, D):
        store.ahead.begin(page, store.slot())
        store.ahead.routed.add(page)
    store.ahead.routed.add((3, 0))  # of another layer
    store.disk.end(A)
    store.disk.end(B)
    store.disk.end(D)
    store.ahead.settle(2, [A, D])
    assert store.ahead.routed == {(3, 0)} and store.gate.told == [(2, 1)]
    assert (store.counters.prefetch_useful, store.counters.prefetch_wasted) == (2, 1)
    assert (store.counters.disk_pages, store.counters.ram_pages) == (2, -2)  # the request counts it as held
    assert C not in store.ahead and store.slots.n_free == 1  # it had not begun: nothing was wasted


def test_a_prefetch_that_fails_leaves_its_page_on_disk(store: Store) -> None:
    store.ahead.begin(A, store.slot())
    store.ahead.routed.add(A)
    store.disk.end(A, BadModel("It is bad."))
    store.ahead.settle(1, [])
    assert A not in store.ahead and A not in store.slots and not store.ahead.routed
    assert store.slots.n_free == 4 and store.counters.disk_bytes == 0


def test_the_last_prefetch_that_no_router_named_and_that_has_not_begun_is_cancelled(store: Store) -> None:
    slots = {}
    for page in (A, B, C, D):
        slots[page] = store.slot()
        store.ahead.begin(page, slots[page])
    store.ahead.routed.add(D)
    store.disk.begin(C)
    assert store.ahead.cancel_last() == (B, slots[B])
    assert store.ahead.cancel_last() == (A, slots[A])
    assert store.ahead.cancel_last() is None and len(store.ahead) == 2


class Requests(Lru):
    """Remembers what was asked for."""

    def __init__(self) -> None:
        super().__init__(4, 8)
        self.asked: list[tuple[int, list[int]]] = []

    def request(self, layer: int, experts: list[int]) -> None:  # type: ignore[override]
        self.asked.append((layer, list(experts)))


def test_what_is_counted_later_is_counted_once_and_token_by_token() -> None:
    policy, counters = Requests(), PageCounters()
    later = DeferredCounts(policy, counters)
    later.note_prompt(1, [[0, 1], [2, 3]])
    later.note_prompt(2, [[4, 5], [6, 7]])
    later.note(1, torch.tensor([[3, 1], [1, 2]]))
    assert later.waiting
    later.count()
    prompt = [(1, [0, 1]), (2, [4, 5]), (1, [2, 3]), (2, [6, 7])]
    assert policy.asked == [*prompt, (1, [1, 2, 3])] and counters.gpu_pages == 3
    later.count()
    assert len(policy.asked) == 5 and not later.waiting
    later.note(1, torch.tensor([[3, 1]]))
    later.note(2, torch.tensor([[3, 1], [1, 2]]))  # of more tokens: the step before is counted
    assert policy.asked[5:] == [(1, [1, 3])]
