"""Which slots a sequence has: as many as its positions need and one more, none of them twice."""

from collections.abc import Sequence

import pytest
import torch

from localmimo.kv.block_table import BlockTable

POSITIONS = 4


class Pool:
    """Ten slots."""

    def __init__(self) -> None:
        self.slab = torch.zeros(10, 8, dtype=torch.uint8)
        self.unused = list(range(10))

    def allocate(self, table: BlockTable, n: int) -> list[int]:
        taken, self.unused = self.unused[:n], self.unused[n:]
        return taken

    def free(self, slots: Sequence[int]) -> None:
        self.unused += slots


@pytest.fixture
def table() -> BlockTable:
    return BlockTable(Pool(), POSITIONS, 40)


@pytest.mark.parametrize(("length", "slots"), [(0, 0), (1, 1), (POSITIONS, 1), (POSITIONS + 1, 2), (40, 10)])
def test_slots_for_so_many_positions(table: BlockTable, length: int, slots: int) -> None:
    table.reserve(length)
    assert len(table.slots) == slots
    assert table.table[:slots].tolist() == table.slots and len(table.table) == 10
    assert table.holds(length) and table.holds(slots * POSITIONS) and not table.holds(slots * POSITIONS + 1)


@pytest.mark.parametrize(("length", "kept"), [(0, 1), (1, 2), (POSITIONS, 2), (POSITIONS + 1, 3), (40, 10)])
def test_a_cut_keeps_one_slot_to_go_on(table: BlockTable, length: int, kept: int) -> None:
    table.reserve(40)
    before = list(table.slots)
    table.cut(length)
    assert table.slots == before[:kept] and table.pool.unused == before[kept:]


def test_slots_that_moved_or_were_lost(table: BlockTable) -> None:
    table.reserve(3 * POSITIONS)
    table.relocate({0: 5, 1: 4, 2: 6})
    assert table.slots == [5, 4, 6] and table.table[:3].tolist() == [5, 4, 6]
    table.relocate({5: 1, 4: 2})
    assert table.slots == [1, 2] and not table.holds(3 * POSITIONS)
