"""QTensor: one packed matrix in memory, and `quantize`, which makes it. Knows codecs, no files and no
names."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from quant import kernels
from quant.errors import QuantError
from quant.formats import codec as codecs
from quant.formats import eightbit, fourbit
from quant.formats.codec import Codec, Shape
from quant.formats.distortion import Distortion, sum_of_squares

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
            out[start:stop] = _decode(self.rows(start, stop))
        return out


def _rows_of(part: Tensor, name: str, kind: Codec, start: int, stop: int) -> Tensor:
    step = 1 if name == "weight" else kind.row_step
    return part[start // step : codecs.ceil_div(stop, step)]


def row_bands(shape: Shape, step: int, limit: int = BAND) -> list[tuple[int, int]]:
    """Cut [rows, cols] into ranges of rows, multiples of `step`, of at most about `limit` weights."""
    rows, cols = shape
    height = max(step, limit // max(cols, 1) // step * step)
    return [(start, min(start + height, rows)) for start in range(0, rows, height)]


def _decode(q: QTensor) -> Tensor:
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


def quantize(weight: Tensor, format: str = "nf4") -> QTensor:
    """Pack a float matrix [rows, cols]. Raises QuantError on NaN or infinity, BadRecipe on an unknown
    format."""
    return quantize_measured(weight, format)[0]


def quantize_measured(
    weight: Tensor, format: str, *, largest: float | None = None
) -> tuple[QTensor, Distortion]:
    """Pack a float matrix and say how far it is off.

    A matrix too big for memory is packed in bands of rows, each a multiple of the codec's row step: give
    every band the `largest` magnitude of the whole matrix, and the parts laid end to end are those of the
    whole matrix.
    """
    kind = codecs.codec(format)
    if weight.ndim != 2 or 0 in weight.shape:
        raise QuantError(f"Only matrices can be packed, not a tensor of shape {list(weight.shape)}.")
    weight = weight.detach().to("cpu", torch.float32)
    here = float(weight.abs().max())
    if not here < float("inf"):  # also true for NaN
        raise QuantError("The matrix contains NaN or infinity and can not be packed.")
    shape = (weight.shape[0], weight.shape[1])
    parts, error = _encode(kind, weight, here if largest is None else largest)
    return QTensor(format, shape, parts), Distortion(error, sum_of_squares(weight))


def _encode(kind: Codec, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], float]:
    match kind.kind:
        case "four":
            return _encode_four(kind, weight, largest)
        case "int8":
            parts = eightbit.encode_int8(kind, weight)
        case "fp8":
            parts = eightbit.encode_fp8(kind, weight)
        case _:
            parts = {"weight": weight.to(DTYPES[kind.name]).contiguous()}
    packed = QTensor(kind.name, (weight.shape[0], weight.shape[1]), parts)
    return parts, sum(sum_of_squares(_decode(packed.rows(a, b)) - weight[a:b]) for a, b in packed.bands())


def _encode_four(kind: Codec, weight: Tensor, largest: float) -> tuple[dict[str, Tensor], float]:
    """By the native search where there is one: the same bytes as the reference's, sooner."""
    scale = fourbit.tensor_scale(kind.name, largest)
    covers, steps = fourbit.search_space(kind.name)
    native = kernels.encode(kind.name, weight, scale, fourbit.book(kind.name), covers, steps)
    if native is None:
        return fourbit.encode(kind, weight, scale)
    codes, scales, squared_error = native
    parts = {"codes": codes, "scales": scales, "scale": torch.tensor([scale], dtype=torch.float32)}
    return parts, squared_error * scale * scale
