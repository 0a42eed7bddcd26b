"""Keys and values of one sequence: a ring per window layer, a growing cache per global layer.

On a GPU the growing caches are in blocks: slots of the slab that also holds the experts' pages.

Knows positions and bytes. Must not know tokens, weights or attention. The layout of a ring stays in this file: callers
read and write through `Rows`, which say in which row a position is, and a snapshot lists rows in position order.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from localmimo.kv.block_table import BlockTable, RowPieces, SlotPool
from localmimo.kv.sizes import kv_row_bytes, positions_per_slot
from localmimo.limits import SLACK
from localmimo.model.attention import Rows
from localmimo.model.config import LayerSpec
from quant.files.hugepages import mapping
from quant.formats.codec import ROW_SCALE_BYTES

CPU = torch.device("cpu")
HUGE_PAGE_BYTES = 64 << 20  # larger buffers ask for huge pages: small pages slow a long read down


def row_width(d: int, dtype: torch.dtype) -> int:
    """Elements of a row of d values: in int8 the row ends with a float32 scale."""
    return d + ROW_SCALE_BYTES if dtype == torch.int8 else d


class GlobalKV:
    """Keys and values of a global layer: address space for the whole context, memory only where it was written.

    Anonymous memory costs nothing until it is touched, so growing copies nothing.
    """

    def __init__(self, spec: LayerSpec, capacity: int, dtype: torch.dtype) -> None:
        self._keys = _untouched((spec.n_kv_heads, capacity, row_width(spec.head_dim, dtype)), dtype)
        self._values = _untouched((spec.n_kv_heads, capacity, row_width(spec.v_head_dim, dtype)), dtype)
        self.length = 0

    @staticmethod
    def nbytes(spec: LayerSpec, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that `tokens` tokens occupy."""
        return tokens * kv_row_bytes(spec, dtype.itemsize)

    def next_rows(self, n: int) -> Rows:
        """Rows for the next n tokens; they also hold every earlier position that these tokens see."""
        return Rows(self._keys, self._values)

    def commit(self, rows: Rows, n: int) -> None:
        """The n tokens that `rows` was for are written."""
        self.length += n

    def rewind(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.length = length

    def stored_rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every position, in position order; views."""
        return self._keys[:, : self.length], self._values[:, : self.length]

    def reserve(self, length: int) -> tuple[Tensor, Tensor]:
        """Become `length` long; the views that the caller fills with what `stored_rows` gave."""
        self.length = length
        return self.stored_rows()


class BlockKV:
    """Keys and values of a global layer on a GPU: a part of each block of the sequence."""

    def __init__(self, spec: LayerSpec, dtype: torch.dtype, blocks: BlockTable, offset: int) -> None:
        """offset: of the layer's part in a slot, in bytes."""
        self._spec = spec
        self._dtype = dtype
        self._blocks = blocks
        self._offset = offset
        self.length = 0

    def next_rows(self, n: int) -> Rows:
        """Rows for the next n tokens; they also hold every earlier position that these tokens see."""
        return Rows(*self._parts(), table=self._blocks.table)

    def commit(self, rows: Rows, n: int) -> None:
        """The n tokens that `rows` was for are written."""
        self.length += n

    def rewind(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.length = length

    def stored_rows(self) -> tuple[RowPieces, RowPieces]:
        """Keys and values of every position, in position order, as views of the blocks."""
        keys, values = (self._scattered(i) for i in range(2))
        return keys, values

    def reserve(self, length: int) -> tuple[RowPieces, RowPieces]:
        """Become `length` long; the views that the caller fills with what `stored_rows` gave."""
        self._blocks.reserve(length)
        self.length = length
        return self.stored_rows()

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots of the slab, [slots, kv_heads, positions, d], whatever they hold.

        Made anew for each call: a view that is kept would keep the slab's memory from being freed.
        """
        slab, at, views = self._blocks.pool.slab, self._offset, []
        for d in (self._spec.head_dim, self._spec.v_head_dim):
            shape = self._spec.n_kv_heads, self._blocks.positions, row_width(d, self._dtype)
            end = at + math.prod(shape) * self._dtype.itemsize
            views.append(slab[:, at:end].view(self._dtype).unflatten(1, shape))
            at = end
        return views[0], views[1]

    def _scattered(self, part: int) -> RowPieces:
        length, (heads, _, width) = self.length, self._parts()[part].shape[1:]
        return RowPieces(self._dtype, (heads, length, width), lambda: self._pieces(part, length))

    def _pieces(self, part: int, length: int) -> Iterator[Tensor]:
        view, n = self._parts()[part], self._blocks.positions
        for head in range(view.shape[1]):
            for i, slot in enumerate(self._blocks.slots[: -(-length // n)]):
                yield view[slot, head, : min(n, length - i * n)]


class WindowKV:
    """Keys and values of a window layer: a ring of window + slack rows; position p is in row p mod rows."""

    def __init__(
        self, spec: LayerSpec, dtype: torch.dtype, slack: int = SLACK, device: torch.device = CPU
    ) -> None:
        assert spec.window is not None
        self.window = spec.window
        self.rows = spec.window + slack
        make = partial(torch.zeros, dtype=dtype, device=device)
        self._keys = make((spec.n_kv_heads, self.rows, row_width(spec.head_dim, dtype)))
        self._values = make((spec.n_kv_heads, self.rows, row_width(spec.v_head_dim, dtype)))
        self.length = 0
        # One past the highest position written: the ring holds the `rows` positions below it, but none below `_oldest`
        # (which a restore sets).
        self._written = 0
        self._oldest = 0

    @staticmethod
    def nbytes(spec: LayerSpec, dtype: torch.dtype = torch.bfloat16, slack: int = 0) -> int:
        """Bytes of the ring; with no slack, of the window alone."""
        assert spec.window is not None
        return (spec.window + slack) * kv_row_bytes(spec, dtype.itemsize)

    def next_rows(self, n: int) -> Rows:
        """Rows for the next n tokens: the ring, or a copy that begins with the positions that they see."""
        if n <= self.rows - self.window + 1:
            return Rows(self._keys, self._values)
        oldest = max(0, self.length - self.window + 1)
        before = self.length - oldest
        keys, values = self.empty(before + n)
        keys[:, :before], values[:, :before] = self._rows_from(oldest)
        return Rows(keys, values, oldest)

    def commit(self, rows: Rows, n: int) -> None:
        """The n tokens that `rows` was for are written."""
        if rows.keys is self._keys:
            self._advance(n)
        else:
            self._write(rows.keys[:, -n:], rows.values[:, -n:])

    def _write(self, keys: Tensor, values: Tensor) -> None:
        end = self.length + keys.shape[1]
        last = min(keys.shape[1], self.rows)
        rows = torch.arange(end - last, end, device=keys.device) % self.rows
        self._keys[:, rows] = keys[:, -last:]
        self._values[:, rows] = values[:, -last:]
        self._advance(keys.shape[1])

    def _advance(self, n: int) -> None:
        self.length += n
        self._written = max(self._written, self.length)

    def can_rewind(self, length: int) -> bool:
        """Whether the ring still has every position that a token at `length` sees."""
        return length == self.length or (
            length < self.length
            and max(0, length - self.window + 1) >= max(self._oldest, self._written - self.rows)
        )

    def rewind(self, length: int) -> None:
        """Forget everything from position `length` on; `can_rewind` must hold."""
        assert self.can_rewind(length), (length, self.length, self._written)
        self.length = length

    def copy(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the last `window` positions, in position order."""
        return self._rows_from(max(0, self.length - self.window))

    def stored_rows(self) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of every position that the ring still has, in position order."""
        return self._rows_from(max(0, self._oldest, self._written - self.rows))

    def clear(self) -> None:
        """Forget every position."""
        self.restore(0, self._keys[:, :0], self._values[:, :0])

    def empty(self, rows: int) -> tuple[Tensor, Tensor]:
        """Unset keys and values of `rows` positions, in the shape that `restore` takes."""
        keys, values = self._keys, self._values
        return keys.new_empty(len(keys), rows, keys.shape[2]), values.new_empty(
            len(values), rows, values.shape[2]
        )

    def _rows_from(self, position: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(position, self.length, device=self._keys.device) % self.rows
        return self._keys[:, rows], self._values[:, rows]

    def restore(self, length: int, keys: Tensor, values: Tensor) -> None:
        """Become what `copy` gave when the sequence was `length` long."""
        self._oldest = length - keys.shape[1]
        self._written = 0
        self.length = self._oldest
        self._write(keys, values)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Main memory that is not used until it is written."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    return torch.frombuffer(
        mapping(max(1, size), huge=size >= HUGE_PAGE_BYTES), dtype=dtype, count=count
    ).view(shape)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The windows as they were when the sequence was `length` long: enough to return to that length."""

    length: int
    windows: tuple[tuple[Tensor, Tensor], ...]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.windows)


class KVCache:
    """The KV of one sequence: a GlobalKV, BlockKV or WindowKV per layer, all of the same length."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        capacity: int,
        dtype: torch.dtype,
        slack: int = SLACK,
        device: torch.device = CPU,
        pool: SlotPool | None = None,
    ) -> None:
        """pool: of slots for the global layers, which a GPU must have."""
        self.capacity = capacity
        grows = [spec for spec in specs if spec.window is None]
        self._blocks = _block_table(grows, capacity, dtype, pool) if pool is not None and grows else None
        self.layers: list[GlobalKV | BlockKV | WindowKV] = []
        offset = 0  # of the next layer's part in a slot
        for spec in specs:
            if spec.window is not None:
                self.layers.append(WindowKV(spec, dtype, slack, device))
            elif self._blocks is None:
                assert device.type == "cpu"
                self.layers.append(GlobalKV(spec, capacity, dtype))
            else:
                self.layers.append(BlockKV(spec, dtype, self._blocks, offset))
                offset += self._blocks.positions * kv_row_bytes(spec, dtype.itemsize)
        self.length = 0

    def reserve(self, n: int) -> None:
        """Reserve memory for n more tokens: on a GPU the pool may evict pages for them."""
        if self._blocks is not None:
            self._blocks.reserve(self.length + n)

    @property
    def is_whole(self) -> bool:
        """Whether every position is still there: a pool that loses its memory loses its content."""
        return self._blocks is None or self._blocks.holds(self.length)

    @staticmethod
    def nbytes(specs: Sequence[LayerSpec], tokens: int, dtype: torch.dtype, slack: int = SLACK) -> int:
        """Bytes that a sequence of `tokens` tokens occupies."""
        return sum(
            GlobalKV.nbytes(spec, tokens, dtype)
            if spec.window is None
            else WindowKV.nbytes(spec, dtype, slack)
            for spec in specs
        )

    def advance(self, n: int) -> None:
        """Every layer has appended n more tokens."""
        self.length += n

    def rewind(self, length: int) -> bool:
        """Forget everything from position `length` on; False (and nothing done) where a window is gone.

        Also cuts layers that a stopped step left longer than the others.
        """
        if not all(window.can_rewind(length) for _, window in self.windows()):
            return False
        self._cut(length)
        return True

    def _cut(self, length: int) -> None:
        for layer in self.layers:
            layer.rewind(length)
        if self._blocks is not None:
            self._blocks.cut(length)
        self.length = length

    def clear(self) -> None:
        """Become empty; takes no memory, since a device may have none left."""
        for _, window in self.windows():
            window.clear()
        self._cut(0)

    def snapshot(self) -> Snapshot:
        """What `restore` needs to return to this length: only the windows, since global layers can be cut anywhere."""
        return Snapshot(self.length, tuple(window.copy() for _, window in self.windows()))

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this sequence: everything before it is as it was."""
        for (_, window), (keys, values) in zip(self.windows(), snapshot.windows, strict=True):
            window.restore(snapshot.length, keys, values)
        self._cut(snapshot.length)

    def windows(self) -> list[tuple[int, WindowKV]]:
        """The window layers with their indices."""
        return [(i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, WindowKV)]


def _block_table(specs: Sequence[LayerSpec], capacity: int, dtype: torch.dtype, pool: SlotPool) -> BlockTable:
    row = sum(kv_row_bytes(spec, dtype.itemsize) for spec in specs)
    return BlockTable(pool, positions_per_slot(pool.slab.shape[1], row), capacity)
