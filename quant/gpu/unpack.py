"""Packed weights inside a GPU program: words of codes, scale bytes and the code book; and whole matrices to
bf16.

Shared by the other kernels of this package. Layouts are those of `quant/formats/codec.py`, seen as 32-bit words: for
every row group, word q*16 + r holds four bytes of row r. Of a four-bit codec they carry eight columns,
(q//4)*32 + (q%4)*4 + 0..3 in the low nibbles and the columns 16 to the right in the high ones; of int8 the
four columns q*4 + 0..3. So a tile [Q, 16] of words is contiguous memory, read with 16-byte loads, and
the columns that share a byte and a nibble (a "plane": four or eight per codec) all sit q by q in one tile.

How a code becomes a value, compiled: each lane of a warp holds one of the 16 entries of the book (twice
over), a lookup is one shift and one warp shuffle, and the value appears in the layout that the arithmetic
wants. Interpreted, where there are no lanes: a load from the book. The load would also do on a GPU (64 bytes
in the first-level cache), but for sm_90 the whole expert loop then compiles to 7.3 instructions per weight
instead of 4.4, and the tiles for tensor cores to 11.6 instead of 7.4. Other ways, on paper: a tree of
selections takes 15 instructions, a 256-entry table of pairs has bank conflicts, permuted bytes (PRMT) give
bfloat16 only.

It must not know pages, experts or torch.
"""

# ruff: noqa: N803, RET505  (constants of a kernel are in capitals; branches on them are for the compiler)
from __future__ import annotations

import triton
import triton.language as tl

NF4 = tl.constexpr(0)
NF4_16 = tl.constexpr(1)
MXFP4 = tl.constexpr(2)
INT8 = tl.constexpr(3)


@triton.jit
def scale_index(q, r, HIGH: tl.constexpr, FORMAT: tl.constexpr):
    """The index of the scale of word (q, r) in the scales of its row group; HIGH: that of the high nibbles."""
    if FORMAT == INT8:
        return (q // 16) * 16 + r
    elif FORMAT == NF4_16:
        return (q // 4) * 32 + HIGH * 16 + r
    else:
        return (q // 4) * 16 + r


BY_SHUFFLE = tl.constexpr(isinstance(scale_index, triton.JITFunction))  # compiled, not interpreted


@triton.jit
def code_table(book):
    """What `plane_value` looks codes up in: the address of the book, or this lane's entry of it."""
    if BY_SHUFFLE:
        lane = tl.inline_asm_elementwise(
            "{ .reg .u32 l; mov.u32 l, %laneid; and.b32 $0, l, $1; }", "=r,r", [15], tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
        return tl.load(book + lane)
    else:
        return book


@triton.jit
def scale_value(stored, FORMAT: tl.constexpr):
    """Scale bytes (float16 for int8) -> float32, by arithmetic alone.

    e4m3 bits moved under a float16 exponent are the value over 2^8, subnormal ones included; float8 types
    would need compute capability 8.9. (Bytes 127 and 255, NaN, are never packed and become 480 here.) e8m0
    bits are a float32 exponent, byte 0 its subnormal 2^-127, byte 255 NaN.
    """
    if FORMAT == INT8:
        return stored.to(tl.float32)
    elif FORMAT == MXFP4:
        byte = stored.to(tl.int32)
        bits = tl.where(byte == 255, 0x7FC00000, tl.maximum(byte << 23, 0x400000))
        return bits.to(tl.float32, bitcast=True)
    else:
        byte = stored.to(tl.int32)
        half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def plane_value(words, table, PLANE: tl.constexpr, FORMAT: tl.constexpr):
    """The unscaled values of one plane of a tile of words: byte PLANE % 4, high nibbles from plane 4 on."""
    if FORMAT == INT8:
        return ((words << (24 - 8 * PLANE)) >> 24).to(tl.float32)
    else:
        code = words >> (8 * (PLANE % 4) + 4 * (PLANE // 4))
        if BY_SHUFFLE:  # lanes 16 to 31 hold the book again, so the bit above the code does no harm
            return tl.inline_asm_elementwise(
                "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [table, code], tl.float32,
                is_pure=False, pack=1,
            )  # fmt: skip
        else:
            return tl.load(table + (code & 15))


@triton.jit
def dequantize_kernel(
    words, scales, scale, book, out, n_rows, n_cols, n_q,
    Q: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """One row group, Q words of each of its rows -> out [n_rows, n_cols], row-major.

    Four neighbouring columns are joined in a thread, so that every store is of 8 bytes (bf16) and full
    sectors are written.
    """
    group = tl.program_id(0).to(tl.int64)
    q = (tl.program_id(1) * Q + tl.arange(0, Q))[:, None]
    r = tl.arange(0, 16)[None, :]
    inside = q < n_q
    tile = tl.load(words + group * n_q * 16 + q * 16 + r, mask=inside, other=0)
    table = code_table(book)
    whole = tl.load(scale) if FORMAT != INT8 else 1.0
    for half in tl.static_range(1 if FORMAT == INT8 else 2):
        per_group = scale_index(n_q, 0, 0, FORMAT)
        stored = tl.load(scales + group * per_group + scale_index(q, r, half, FORMAT), mask=inside, other=0)
        factor = scale_value(stored, FORMAT)
        v0 = plane_value(tile, table, half * 4 + 0, FORMAT) * factor * whole
        v1 = plane_value(tile, table, half * 4 + 1, FORMAT) * factor * whole
        v2 = plane_value(tile, table, half * 4 + 2, FORMAT) * factor * whole
        v3 = plane_value(tile, table, half * 4 + 3, FORMAT) * factor * whole
        four = tl.join(tl.join(v0, v2), tl.join(v1, v3)).reshape(Q, 16, 4)
        first = q * 4 if FORMAT == INT8 else (q // 4) * 32 + half * 16 + (q % 4) * 4
        col = first[:, :, None] + tl.arange(0, 4)[None, None, :]
        row = (group * 16 + r)[:, :, None]
        present = (row < n_rows) & (col < n_cols)
        tl.store(out + row * n_cols + col, four.to(out.dtype.element_ty), mask=present)
