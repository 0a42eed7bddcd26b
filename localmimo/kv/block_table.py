"""Block table: the slots of a slab on a GPU that hold the global layers' keys and values of one sequence.

A slot holds a fixed number of positions of all these layers. It is allocated from the pool that owns the slab, and is
freed when the sequence is cut. Must not know what else the slab holds, nor what a row is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class SlotPool(Protocol):
    """The owner of the slab."""

    @property
    def slab(self) -> Tensor:
        """uint8 [slots, bytes] on the device."""

    def allocate(self, table: "BlockTable", n: int) -> list[int]:
        """n slots, whose content belongs to `table` from now on."""

    def free(self, slots: Sequence[int]) -> None:
        """Slots that were allocated are not needed any more."""


class BlockTable:
    """The slots of one sequence, in the order of its positions."""

    def __init__(self, pool: SlotPool, positions: int, capacity: int) -> None:
        """positions: in one slot. capacity: positions of the longest sequence."""
        self.pool = pool
        self.positions = positions
        self.slots: list[int] = []
        # Kernels read it, so its address must not change.
        self.table = torch.zeros(-(-capacity // positions), dtype=torch.int32, device=pool.slab.device)

    def reserve(self, length: int) -> None:
        """Allocate slots for the first `length` positions."""
        n_missing = -(-length // self.positions) - len(self.slots)
        if n_missing > 0:
            self.slots += self.pool.allocate(self, n_missing)
            self._write()

    def cut(self, length: int) -> None:
        """Free the slots behind position `length`, but for one more: the sequence usually goes on from there."""
        n_kept = -(-length // self.positions) + 1
        if len(self.slots) > n_kept:
            self.pool.free(self.slots[n_kept:])
            del self.slots[n_kept:]

    def holds(self, length: int) -> bool:
        """Whether the first `length` positions still have their slots."""
        return length <= len(self.slots) * self.positions

    def relocate(self, to: Mapping[int, int]) -> None:
        """The pool has moved the content of each slot to another one; a slot that `to` does not name is lost."""
        self.slots = [to[slot] for slot in self.slots if slot in to]
        self._write()

    def _write(self) -> None:
        self.table[: len(self.slots)].copy_(torch.tensor(self.slots, dtype=torch.int32))


@dataclass(frozen=True, slots=True)
class RowPieces:
    """A tensor in several pieces of memory: the pieces, one after the other, are its elements in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        n = 1
        for length in self.shape:
            n *= length
        return n * self.dtype.itemsize
