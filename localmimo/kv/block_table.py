"""Blocks: which slots of a slab on a GPU hold the global layers' keys and values of one sequence.

A slot has room for so many positions of all these layers. It is lent by whoever else uses the slab, and goes back when
the sequence is cut. Knows slots and positions; not what else lies in the slab, nor what a row is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class SlotPool(Protocol):
    """Whoever owns the slab."""

    @property
    def slab(self) -> Tensor:
        """uint8 [slots, bytes] on the device."""

    def lend(self, borrower: "BlockTable", n: int) -> list[int]:
        """n slots, whose content is the borrower's from now on."""

    def take_back(self, slots: Sequence[int]) -> None:
        """Slots that were lent are not needed any more."""


class BlockTable:
    """The slots of one sequence, in the order of its positions."""

    def __init__(self, lender: SlotPool, positions: int, capacity: int) -> None:
        """positions: of a slot. capacity: positions of the longest sequence."""
        self.lender = lender
        self.positions = positions
        self.slots: list[int] = []
        # Kernels read it: it stays where it is.
        self.table = torch.zeros(-(-capacity // positions), dtype=torch.int32, device=lender.slab.device)

    def reach(self, length: int) -> None:
        """Have room for the first `length` positions."""
        n_missing = -(-length // self.positions) - len(self.slots)
        if n_missing > 0:
            self.slots += self.lender.lend(self, n_missing)
            self._write()

    def cut(self, length: int) -> None:
        """Positions from `length` on are not needed; one slot more stays, for whoever goes on from there."""
        n_kept = -(-length // self.positions) + 1
        if len(self.slots) > n_kept:
            self.lender.take_back(self.slots[n_kept:])
            del self.slots[n_kept:]

    def holds(self, length: int) -> bool:
        """Whether the first `length` positions have their slots still."""
        return length <= len(self.slots) * self.positions

    def moved(self, to: Mapping[int, int]) -> None:
        """The lender has put every slot's content into another slot, or lost it: `to` does not name it then."""
        self.slots = [to[slot] for slot in self.slots if slot in to]
        self._write()

    def _write(self) -> None:
        self.table[: len(self.slots)].copy_(torch.tensor(self.slots, dtype=torch.int32))


@dataclass(frozen=True, slots=True)
class RowPieces:
    """A tensor that lies in pieces: these, one behind the other, are its elements in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        n = 1
        for length in self.shape:
            n *= length
        return n * self.dtype.itemsize
