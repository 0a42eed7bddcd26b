"""y = x W^T for 1 to 8 tokens, straight from packed words: float32 sums on the ordinary float units.

A program takes one row group (16 rows) of some adjacent columns: its codes are contiguous, every thread
reads 16 bytes (four rows, four or eight columns; so Q must be 8 per warp), UNROLL of them before it needs the
first, multiplies with the x of its columns and keeps its own sums to the end. At most two tokens per program:
with more, the tile of x has more elements than the program has threads and the compiler sends it through
shared memory. Programs of further tokens run beside each other and find the codes in the caches. Where a
matrix has too few row groups to fill a GPU, its columns are split and the pieces are added in a fixed order
by a second kernel. Nothing is timed or tuned at run time: which thread adds what is fixed by the shape of the
matrix, so the same input gives the same bits, whatever the number of tokens.

It must not know pages or experts.
"""

# ruff: noqa: N803, RET505  (constants of a kernel are in capitals; branches on them are for the compiler)
from __future__ import annotations

import triton
import triton.language as tl

from quant.gpu.unpack import INT8, NF4_16, code_table, plane_value, scale_index, scale_value


@triton.jit
def low_half(pair):
    """The bfloat16 in the low half of a 32-bit word, as float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half(pair):
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def four_columns(x, quad, present, BF16: tl.constexpr):
    """x[quad*4 + 0..3] as four float32 tiles. x is seen as 64-bit words: two loads at most, whatever the
    type.
    """
    if BF16:
        bits = tl.load(x + quad, mask=present, other=0)
        front, back = bits.to(tl.int32), (bits >> 32).to(tl.int32)
        return low_half(front), high_half(front), low_half(back), high_half(back)
    else:
        front = tl.load(x + quad * 2, mask=present, other=0)
        back = tl.load(x + quad * 2 + 1, mask=present, other=0)
        x0 = front.to(tl.int32).to(tl.float32, bitcast=True)
        x1 = (front >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        x2 = back.to(tl.int32).to(tl.float32, bitcast=True)
        x3 = (back >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        return x0, x1, x2, x3


@triton.jit
def quads_per_row(N_Q: tl.constexpr, FORMAT: tl.constexpr):
    """Groups of four columns in a row of N_Q words, padding included."""
    return N_Q if FORMAT == INT8 else 2 * N_Q


@triton.jit
def input_tiles(x, row, q, present, FORMAT: tl.constexpr, BF16: tl.constexpr):
    """The x of every plane of the words q: row [T, 1] starts of rows in groups of four columns, q [1, Q]."""
    if FORMAT == INT8:
        low = four_columns(x, row + q, present, BF16)
        return low, low
    else:
        quad = row + (q // 4) * 8 + q % 4
        return four_columns(x, quad, present, BF16), four_columns(x, quad + 4, present, BF16)


@triton.jit
def four_planes(tile, table, x, HIGH: tl.constexpr, FORMAT: tl.constexpr):
    """Sum over four planes of x times value: tile [1, Q, 16], x four tiles [T, Q] -> [T, Q, 16]."""
    total = x[0][:, :, None] * plane_value(tile, table, HIGH * 4 + 0, FORMAT)
    total += x[1][:, :, None] * plane_value(tile, table, HIGH * 4 + 1, FORMAT)
    total += x[2][:, :, None] * plane_value(tile, table, HIGH * 4 + 2, FORMAT)
    total += x[3][:, :, None] * plane_value(tile, table, HIGH * 4 + 3, FORMAT)
    return total


@triton.jit
def word_sums(words, scales, table, low, high, q, inside, FORMAT: tl.constexpr):
    """The words q [Q] of one row group times their x -> [T, Q, 16]; scales applied, the tensor scale not."""
    q = q[None, :, None]
    inside = inside[None, :, None]
    r = tl.arange(0, 16)[None, None, :]
    tile = tl.load(words + q * 16 + r, mask=inside, other=0)
    stored = tl.load(scales + scale_index(q, r, 0, FORMAT), mask=inside, other=0)
    factor = scale_value(stored, FORMAT)
    total = four_planes(tile, table, low, 0, FORMAT)
    if FORMAT == INT8:
        return total * factor
    elif FORMAT == NF4_16:
        stored = tl.load(scales + scale_index(q, r, 1, FORMAT), mask=inside, other=0)
        return total * factor + four_planes(tile, table, high, 1, FORMAT) * scale_value(stored, FORMAT)
    else:
        return (total + four_planes(tile, table, high, 1, FORMAT)) * factor


@triton.jit
def gemv_kernel(
    x, words, scales, scale, book, y, n_tokens, n_rows,
    N_Q: tl.constexpr, PER_SPLIT: tl.constexpr, T: tl.constexpr, Q: tl.constexpr, UNROLL: tl.constexpr,
    FORMAT: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Program (T tokens, group, split): 16 rows of y [splits, n_tokens, n_rows] from PER_SPLIT words of each
    row.

    x [n_tokens, all columns of the N_Q words of a row of W] as 64-bit words.
    """
    token = tl.program_id(0) * T + tl.arange(0, T)
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * PER_SPLIT
    known = (token < n_tokens)[:, None]
    x_row = token[:, None] * quads_per_row(N_Q, FORMAT)
    table = code_table(book)
    words += group * N_Q * 16
    scales += group * scale_index(N_Q, 0, 0, FORMAT)
    total = tl.zeros([T, Q, 16], tl.float32)
    for start in range(0, PER_SPLIT, Q * UNROLL):
        for step in tl.static_range(UNROLL):
            at = start + step * Q + tl.arange(0, Q)
            q = first + at
            inside = (at < PER_SPLIT) & (q < N_Q)
            low, high = input_tiles(x, x_row, q[None, :], known & inside[None, :], FORMAT, BF16)
            total += word_sums(words, scales, table, low, high, q, inside, FORMAT)
    sums = tl.sum(total, 1)
    if FORMAT != INT8:
        sums *= tl.load(scale)
    row = group * 16 + tl.arange(0, 16)[None, :]
    address = y + (tl.program_id(2) * n_tokens + token[:, None]) * n_rows + row
    tl.store(address, sums.to(y.dtype.element_ty), mask=known & (row < n_rows))


@triton.jit
def add_up_kernel(parts, y, n_cols, outer, inner, N_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """y [rows, n_cols] = sum over p of parts[row * outer + p * inner + column], first to last.

    Serves the split columns of a GEMV and the weighted outputs of a token's experts.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < n_cols
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(N_PARTS):
        total += tl.load(parts + row * outer + part * inner + col, mask=inside, other=0)
    tl.store(y + row * n_cols + col, total.to(y.dtype.element_ty), mask=inside)
