"""Quantize: a float matrix becomes a packed one, by the native search where there is one. Knows no files."""

from __future__ import annotations

import torch

from quant import kernels
from quant.errors import QuantError
from quant.formats import eightbit, fourbit
from quant.formats.codec import Codec, codec
from quant.formats.distortion import Distortion, sum_of_squares
from quant.formats.qtensor import DTYPES, QTensor, decode

Tensor = torch.Tensor


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
    kind = codec(format)
    if weight.ndim != 2 or 0 in weight.shape:
        raise QuantError(f"Only matrices can be packed, not a tensor of shape {list(weight.shape)}.")
    weight = weight.detach().to("cpu", torch.float32)
    magnitude = float(weight.abs().max())
    if not magnitude < float("inf"):  # also true for NaN
        raise QuantError("The matrix contains NaN or infinity and can not be packed.")
    shape = (weight.shape[0], weight.shape[1])
    parts, error = _encode(kind, weight, magnitude if largest is None else largest)
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
    return parts, sum(sum_of_squares(decode(packed.rows(a, b)) - weight[a:b]) for a, b in packed.bands())


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
