"""Codecs as arithmetic: which parts a packed matrix has, in which layout, and how many bytes they take.

Knows shapes and bytes only. It must not import torch: recipes and dry runs compute the size of whole models with it.
The values are made in `qtensor.py`.

Four-bit layout, shared by nf4, nf4-16 and mxfp4 so that one kernel serves them. Rows are padded to 16,
columns to 32. For row group g and column block b of 32 columns `codes[g, b]` are 256 bytes, four vectors v of
64 bytes; byte v*64 + r*4 + j holds the code of row g*16+r, column b*32 + v*4 + j in its low nibble and that
of the column 16 to the right in its high nibble. One such vector is what an AVX-512 dot-product instruction
consumes. `scales[g, b]` holds one byte per row for each sub-block of the 32 columns, all rows of the first
sub-block first.

Eight-bit layout: `codes[g, b, v]` are 64 bytes for columns b*64 + v*4 + j of 16 rows, byte r*4 + j;
`scales[g, b]` has one float16 per row and 64 columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from quant.errors import BadRecipe

Shape = tuple[int, int]  # rows, cols of a weight matrix

ROW_GROUP = 16
ROW_SCALE_BYTES = 4  # behind the values of an int8 row of keys or values: one float32
ITEM_BYTES = {"u8": 1, "i8": 1, "fp8": 1, "f16": 2, "bf16": 2, "i32": 4, "f32": 4}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class PartSpec:
    """One array of a packed matrix: element type, shape and size."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Codec:
    """A way to store a matrix.

    block: columns that share a scale (0: no scales). number: the format's number in the CPU's and the GPU's kernels
    (kernels/src/layout.h, gpu/unpack.py); None where there is no kernel for it.
    """

    name: str
    kind: str  # "four" | "int8" | "fp8" | "plain"
    block: int = 0
    number: int | None = None

    @property
    def row_step(self) -> int:
        """Rows that form a unit of the layout: bands of a multiple of this are packed independently."""
        return {"four": ROW_GROUP, "int8": ROW_GROUP, "fp8": 128, "plain": 1}[self.kind]

    def parts(self, shape: Shape) -> dict[str, PartSpec]:
        """Part name -> spec, in storage order."""
        rows, cols = shape
        groups = ceil_div(rows, ROW_GROUP)
        match self.kind:
            case "four":
                blocks = ceil_div(cols, 32)
                return {
                    "codes": PartSpec("u8", (groups, blocks, 256)),
                    "scales": PartSpec("u8", (groups, blocks, 32 // self.block * ROW_GROUP)),
                    "scale": PartSpec("f32", (1,)),
                }
            case "int8":
                blocks = ceil_div(cols, self.block)
                return {
                    "codes": PartSpec("i8", (groups, blocks, 16, 64)),
                    "scales": PartSpec("f16", (groups, blocks, ROW_GROUP)),
                }
            case "fp8":
                grid = (ceil_div(rows, self.block), ceil_div(cols, self.block))
                return {"weight": PartSpec("fp8", shape), "scales": PartSpec("f32", grid)}
        return {"weight": PartSpec(self.name, shape)}

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all parts, without any padding between them."""
        return sum(part.nbytes for part in self.parts(shape).values())

    def bits_per_weight(self, shape: Shape) -> float:
        return self.nbytes(shape) * 8 / prod(shape)


CODECS = {
    codec.name: codec
    for codec in (
        Codec("nf4", "four", 32, 0),
        Codec("nf4-16", "four", 16, 1),
        Codec("mxfp4", "four", 32, 2),
        Codec("int8", "int8", 64, 3),
        Codec("fp8", "fp8", 128),
        Codec("bf16", "plain"),
        Codec("f32", "plain"),
    )
}
KERNEL_FORMATS = {name: codec.number for name, codec in CODECS.items() if codec.number is not None}


def codec(name: str) -> Codec:
    """The codec of that name; raises BadRecipe naming the known ones."""
    if name not in CODECS:
        raise BadRecipe(f"There is no codec {name!r}. Known codecs: {', '.join(CODECS)}.")
    return CODECS[name]
