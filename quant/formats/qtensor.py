"""A packed matrix in memory, its rows and values. Knows codecs; no files, no names, no kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from quant.formats import codec as codecs
from quant.formats import eightbit, fourbit
from quant.formats.codec import Codec, Shape

Tensor = torch.Tensor

DTYPES = {
    "u8": torch.uint8,
    "i8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
}
BAND = 1 << 22  # weights dequantised at a time: 16 MiB of float32


@dataclass(frozen=True, eq=False)
class QTensor:
    """A matrix [rows, cols] as packed parts; layouts are described in `codec.py`."""

    codec: str
    shape: Shape
    parts: dict[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / (self.shape[0] * self.shape[1])

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    def to(self, device: torch.device | str) -> QTensor:
        return QTensor(self.codec, self.shape, {name: part.to(device) for name, part in self.parts.items()})

    def rows(self, start: int, stop: int) -> QTensor:
        """A view of some rows; `start` must be a multiple of the codec's row step, `stop` too or the end."""
        kind = codecs.codec(self.codec)
        stop = min(stop, self.shape[0])
        if start % kind.row_step or (stop % kind.row_step and stop != self.shape[0]):
            raise ValueError(f"rows {start}:{stop} of {self.codec} must be multiples of {kind.row_step}")
        parts = {
            name: part if name == "scale" else _rows_of(part, name, kind, start, stop)
            for name, part in self.parts.items()
        }
        return QTensor(self.codec, (stop - start, self.shape[1]), parts)

    def bands(self, limit: int = BAND) -> list[tuple[int, int]]:
        """Row ranges of at most about `limit` weights each, cut where the layout allows."""
        return row_bands(self.shape, codecs.codec(self.codec).row_step, limit)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [rows, cols]; beyond the result it needs the memory of one band."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for start, stop in self.bands():
            out[start:stop] = decode(self.rows(start, stop))
        return out


def _rows_of(part: Tensor, name: str, kind: Codec, start: int, stop: int) -> Tensor:
    step = 1 if name == "weight" else kind.row_step
    return part[start // step : codecs.ceil_div(stop, step)]


def row_bands(shape: Shape, step: int, limit: int = BAND) -> list[tuple[int, int]]:
    """Cut [rows, cols] into ranges of rows, multiples of `step`, of at most about `limit` weights."""
    rows, cols = shape
    height = max(step, limit // max(cols, 1) // step * step)
    return [(start, min(start + height, rows)) for start in range(0, rows, height)]


def decode(q: QTensor) -> Tensor:
    """The values float32 [rows, cols] of a packed matrix, all at once."""
    kind = codecs.codec(q.codec)
    rows, cols = q.shape
    match kind.kind:
        case "four":
            return fourbit.decode(kind, q.parts)[:rows, :cols]
        case "int8":
            return eightbit.decode_int8(kind, q.parts)[:rows, :cols]
        case "fp8":
            return eightbit.decode_fp8(kind, q.parts)
    return q.parts["weight"].float()
