"""A canonical matrix as runs of rows of stored tensors, each with its own window into a grid of FP8 scales.

Readers need not know layouts: a plain matrix is one piece, a fused or jointly quantised one is several. It must not
know tensor names. Rows are read one range at a time; torch is imported only for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant.errors import BadCheckpoint
from quant.files.safetensors import Shard, Stored
from quant.formats.codec import ceil_div

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Location:
    """A stored tensor and its file."""

    shard: Shard
    stored: Stored

    @property
    def row_bytes(self) -> int:
        return self.stored.nbytes // max(1, self.stored.shape[0])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Bytes of some rows, uint8 [rows, row bytes]."""
        offset = self.stored.offset + start * self.row_bytes
        return self.shard.read(offset, (stop - start) * self.row_bytes).view(stop - start, self.row_bytes)


@dataclass(frozen=True, slots=True)
class Grid:
    """FP8 scales of a piece: row r of the stored tensor uses scale row first + (r - origin) // block[0]."""

    scales: Location
    block: tuple[int, int]
    origin: int = 0
    first: int = 0

    def row(self, stored_row: int) -> int:
        return self.first + (stored_row - self.origin) // self.block[0]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows first_row .. first_row + n_rows of a stored tensor. `grid` for FP8, `exponents` for MXFP4."""

    weight: Location
    first_row: int
    n_rows: int
    grid: Grid | None = None
    exponents: Location | None = None


@dataclass(frozen=True, slots=True)
class Matrix:
    """A canonical tensor: its shape, how it is stored, and its pieces from top to bottom."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # bf16, f16, f32, fp8 or mxfp4
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales included."""
        places = {place.stored.name: place for piece in self.pieces for place in _places(piece)}
        scales = sum(place.stored.nbytes for place in places.values())
        return scales + sum(piece.n_rows * piece.weight.row_bytes for piece in self.pieces)

    def plain_fp8(self, side: int) -> bool:
        """Whether the scales form one grid of side x side blocks from the top left corner."""
        grid = self.pieces[0].grid
        return len(self.pieces) == 1 and grid is not None and grid.block == (side, side)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the canonical matrix: the stored bf16 or f32, else float32. Raises BadCheckpoint on NaN."""
        import torch

        parts = [_decode(piece, self.dtype, a, b) for piece, a, b in self._cut(start, stop)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        # The largest magnitude is NaN or infinite exactly when some element is.
        if not bool(torch.isfinite(out.abs().max())):
            raise _not_finite([piece for piece, _, _ in self._cut(start, stop)])
        return out.view(-1) if len(self.shape) == 1 else out

    def mxfp4(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes uint8 [rows, cols] and e8m0 scale bytes [rows, cols / 32], untouched."""
        import torch

        (piece,) = self.pieces
        assert piece.exponents is not None
        exponents = piece.exponents.rows(piece.first_row, piece.first_row + piece.n_rows)
        if bool((exponents == 255).any()):
            raise _not_finite([piece])
        packed = piece.weight.rows(piece.first_row, piece.first_row + piece.n_rows)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1)  # low nibble: even column
        return codes.view(len(packed), -1), exponents

    def fp8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored e4m3 weights and float32 scales of a plain grid, untouched."""
        import torch

        (piece,) = self.pieces
        assert piece.grid is not None
        raw = piece.weight.rows(0, piece.n_rows)
        scales = _scale_rows(piece.grid.scales, 0, piece.grid.scales.stored.shape[0])
        if bool((raw & 127 == 127).any()) or not bool(scales.isfinite().all()):
            raise _not_finite([piece])
        return raw.view(torch.float8_e4m3fn), scales

    def forget(self) -> None:
        """Drop what was read from the page cache."""
        for piece in self.pieces:
            stored = piece.weight.stored
            piece.weight.shard.forget(stored.offset, stored.nbytes)

    def _cut(self, start: int, stop: int) -> list[tuple[Piece, int, int]]:
        """The pieces under rows start..stop, each with its range of stored rows."""
        out, top = [], 0
        for piece in self.pieces:
            a, b = max(start, top) - top, min(stop, top + piece.n_rows) - top
            if a < b:
                out.append((piece, piece.first_row + a, piece.first_row + b))
            top += piece.n_rows
        return out


def _not_finite(pieces: list[Piece]) -> BadCheckpoint:
    names = ", ".join(sorted({piece.weight.stored.name for piece in pieces}))
    return BadCheckpoint(f"{names} contains NaN or infinity, in the weights or in their scales.")


def _places(piece: Piece) -> list[Location]:
    scales = piece.grid.scales if piece.grid else piece.exponents
    return [scales] if scales else []


def _decode(piece: Piece, dtype: str, start: int, stop: int) -> torch.Tensor:
    import torch

    raw = piece.weight.rows(start, stop)
    match dtype:
        case "bf16":
            return raw.view(torch.bfloat16)
        case "f32":
            return raw.view(torch.float32)
        case "f16":
            return raw.view(torch.float16).float()
        case "fp8":
            assert piece.grid is not None
            return _scaled(raw.view(torch.float8_e4m3fn).float(), piece.grid, start)
    assert piece.exponents is not None
    return _mxfp4_values(raw, piece.exponents.rows(start, stop))


def _scaled(values: torch.Tensor, grid: Grid, first_row: int) -> torch.Tensor:
    """Multiply each row range that shares a row of scales by it, in place."""
    rows, cols = values.shape
    first, last = grid.row(first_row), grid.row(first_row + rows - 1)
    scales = _scale_rows(grid.scales, first, last + 1).repeat_interleave(grid.block[1], 1)[:, :cols]
    start = 0
    for i in range(last - first + 1):
        stop = min(rows, grid.origin + (first + i - grid.first + 1) * grid.block[0] - first_row)
        values[start:stop].mul_(scales[i])
        start = stop
    return values


def _scale_rows(place: Location, start: int, stop: int) -> torch.Tensor:
    import torch

    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[place.stored.dtype]
    return place.rows(start, stop).view(kind).float()


def _mxfp4_values(packed: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    import torch

    from quant.formats.fourbit import book

    table = book("mxfp4")
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(-1)  # low nibble: even column
    values = table.values.index_select(0, codes.int()).view(len(packed), -1, 32)
    scales = table.scale_of_byte.index_select(0, exponents.reshape(-1).int())
    return values.mul_(scales.view(len(packed), -1, 1)).view(len(packed), -1)


def plain_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Scale rows and columns of a matrix quantised in blocks from its top left corner."""
    return ceil_div(shape[0], block[0]), ceil_div(shape[1], block[1])
