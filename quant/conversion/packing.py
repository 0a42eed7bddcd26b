"""The packing of one dense tensor into a file, or of one expert into a page.

Large matrices are packed in bands of rows, so that memory does not grow with the model. Values that the codec can hold
exactly are rearranged, never rounded a second time. It must not know folders, journals or progress.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from quant.checkpoint.pieces import Matrix
from quant.checkpoint.source import Source
from quant.conversion.listing import BAND, Entry
from quant.formats.codec import codec
from quant.formats.distortion import Distortion
from quant.formats.page import MATRICES, PageLayout

if TYPE_CHECKING:
    from quant.conversion.writer import OpenFile
    from quant.formats.qtensor import QTensor

    Band = tuple[int, QTensor, Distortion]  # first row, packed rows, what they lost


def make_page(source: Source, name: str, page: PageLayout) -> tuple[memoryview, Distortion]:
    """The page of one expert (`layers.L.experts.E`) and its distortion."""
    starts = {(s.matrix, s.part): s.offset for s in page.slices}
    buffer = bytearray(page.bytes)
    total = Distortion()
    for matrix in MATRICES:
        for first_row, packed, distortion in pack_bands(source.matrices[f"{name}.{matrix}"], page.codec):
            for part, offset, data in part_bytes(first_row, packed):
                start = starts[matrix, part] + offset
                buffer[start : start + len(data)] = data
            total += distortion
        source.matrices[f"{name}.{matrix}"].forget()
    return memoryview(buffer), total


def write_dense(source: Source, entry: Entry, offsets: Mapping[str, int], target: OpenFile) -> Distortion:
    """Write one dense tensor to its places in a file. `offsets`: of each part, by its name in the file."""
    matrix = source.matrices[entry.name]
    total = Distortion()
    if len(entry.shape) == 1:
        target.write(offsets[entry.name], _vector_bytes(matrix, entry.codec))
    else:
        for first_row, packed, distortion in pack_bands(matrix, entry.codec):
            for part, offset, data in part_bytes(first_row, packed):
                target.write(offsets[f"{entry.name}.{part}"] + offset, data)
            total += distortion
    matrix.forget()
    return total


def pack_bands(matrix: Matrix, chosen: str) -> Iterator[Band]:
    """The matrix packed in one codec, from top to bottom."""
    from quant.formats.qtensor import QTensor, row_bands
    from quant.ops.quantize import quantize_measured

    kept = _rearranged(matrix, chosen)
    if kept is not None:
        yield 0, kept, Distortion()
        return
    shape = (matrix.shape[0], matrix.shape[1])
    bands = row_bands(shape, codec(chosen).row_step, BAND)
    largest = _largest(matrix, bands) if codec(chosen).kind == "four" and len(bands) > 1 else None
    for start, stop in bands:
        rows = matrix.rows(start, stop)
        if codec(chosen).kind == "plain" and matrix.dtype == chosen:
            yield start, QTensor(chosen, (stop - start, shape[1]), {"weight": rows}), Distortion()
        else:
            yield start, *quantize_measured(rows, chosen, largest=largest)


def part_bytes(first_row: int, packed: QTensor) -> Iterator[tuple[str, int, memoryview]]:
    """Part, offset in it and bytes of a band: row groups are the outermost dimension of every part."""
    import torch

    step = codec(packed.codec).row_step
    for part, tensor in packed.parts.items():
        offset = 0
        if part != "scale":
            row_bytes = tensor[0].numel() * tensor.element_size()
            offset = first_row // (1 if part == "weight" else step) * row_bytes
        yield part, offset, tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _rearranged(matrix: Matrix, chosen: str) -> QTensor | None:
    """A matrix that is stored in the values of the codec, in the codec's layout."""
    from quant.formats import fourbit
    from quant.formats.qtensor import QTensor

    shape = (matrix.shape[0], matrix.shape[1])
    if chosen == matrix.dtype == "mxfp4":
        return QTensor(chosen, shape, fourbit.from_mxfp4(*matrix.mxfp4()))
    if chosen == "fp8" and matrix.plain_fp8(codec("fp8").block):
        weight, scales = matrix.fp8()
        return QTensor(chosen, shape, {"weight": weight, "scales": scales})
    return None


def _largest(matrix: Matrix, bands: list[tuple[int, int]]) -> float:
    """The largest magnitude of the whole matrix: a pass of its own."""
    return max(float(matrix.rows(start, stop).abs().max()) for start, stop in bands)


def _vector_bytes(matrix: Matrix, dtype: str) -> memoryview:
    import torch

    from quant.formats.qtensor import DTYPES

    return matrix.rows(0, matrix.shape[0]).to(DTYPES[dtype]).view(torch.uint8).numpy().data
