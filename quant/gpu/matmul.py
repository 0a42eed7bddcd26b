"""Many tokens at once: tiles of W are unpacked to bfloat16 in registers and multiplied on the tensor cores.

Products are transposed, y^T = W x^T: the unpacked tile is the operand that Hopper's matrix units take from
registers, x comes through shared memory. A tile of words is multiplied plane by plane (see `unpack.py`): the
order of the columns does not matter as long as x has the same, so x arrives as planes [8 or 4, n, N_Q] and no
unpacked weight has to change its place. Scales are applied before the rounding to bfloat16, tensor scales to
the sums.

Experts: tokens are sorted by expert; tile i of the sorted pairs belongs to `tile_expert[i]`, starts at pair
`tile_first[i]` and ends before `tile_last[i]`. Tiles past the last and experts without a slot exit early.
Every pair stores its weighted output in its own row.
"""

# ruff: noqa: N803  (constants of a kernel are in capitals; branches on them are for the compiler)
from __future__ import annotations

import triton
import triton.language as tl

from quant.gpu.unpack import INT8, code_table, plane_value, scale_index, scale_value


@triton.jit
def add_product(
    total, words, scales, table, planes, plane_step, source, present, row, n_rows, start,
    N_Q: tl.constexpr, Q: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """total [R, BT] += W[row, words start..] x^T for the rows `source` [BT] of the planes."""
    q = start + tl.arange(0, Q)
    group, r = row // 16, row % 16
    inside = (row[:, None] < n_rows) & (q[None, :] < N_Q)
    tile = tl.load(words + group[:, None] * (N_Q * 16) + q[None, :] * 16 + r[:, None], mask=inside, other=0)
    grid = scales + group[:, None] * scale_index(N_Q, 0, 0, FORMAT)
    for half in tl.static_range(1 if FORMAT == INT8 else 2):
        at = scale_index(q[None, :], r[:, None], half, FORMAT)
        factor = scale_value(tl.load(grid + at, mask=inside, other=0), FORMAT)
        for j in tl.static_range(4):
            value = (plane_value(tile, table, half * 4 + j, FORMAT) * factor).to(tl.bfloat16)
            address = planes + (half * 4 + j) * plane_step + source[None, :] * N_Q + q[:, None]
            x = tl.load(address, mask=present[None, :] & (q[:, None] < N_Q), other=0.0)
            total = tl.dot(value, x, total)
    return total


@triton.jit
def matmul_kernel(
    planes, words, scales, scale, book, y, n_tokens, n_rows,
    N_Q: tl.constexpr, PER_SPLIT: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, Q: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """y [splits, n_tokens, n_rows] from PER_SPLIT words of each row. Program (token tile, row tile, split).

    planes [8 or 4, n_tokens, N_Q] bfloat16; PER_SPLIT is a multiple of Q. Tiles of tokens run beside each
    other: they read the same codes.
    """
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    row = tl.program_id(1).to(tl.int64) * R + tl.arange(0, R)
    first = tl.program_id(2) * PER_SPLIT
    present = token < n_tokens
    plane_step = n_tokens.to(tl.int64) * N_Q
    table = code_table(book)
    total = tl.zeros([R, BT], tl.float32)
    for start in range(0, PER_SPLIT, Q):
        total = add_product(
            total, words, scales, table, planes, plane_step, token, present, row, n_rows, first + start,
            N_Q, Q, FORMAT,
        )  # fmt: skip
    if FORMAT != INT8:
        total *= tl.load(scale)
    address = y + (tl.program_id(2).to(tl.int64) * n_tokens + token[None, :]) * n_rows + row[:, None]
    tl.store(address, total.to(y.dtype.element_ty), mask=present[None, :] & (row[:, None] < n_rows))


@triton.jit
def slot_of_tile(tile, tile_expert, slots, n_experts, n_slots):
    """The slot of a tile's expert, -1 for a tile past the last and an expert without a slot."""
    expert = tl.load(tile_expert + tile)
    known = (expert >= 0) & (expert < n_experts)
    slot = tl.load(slots + tl.where(known, expert, 0), mask=known, other=-1)
    return tl.where(slot < n_slots, slot, -1)


@triton.jit
def gate_up_tiles_kernel(
    planes, order, tile_expert, tile_first, tile_last, slots, words, small, singles, book, act,
    n_tokens, n_experts, n_slots, n_rows, n_cols,
    K: tl.constexpr, PAGE: tl.constexpr,
    GATE: tl.constexpr, GATE_SCALES: tl.constexpr, GATE_SCALE: tl.constexpr,
    UP: tl.constexpr, UP_SCALES: tl.constexpr, UP_SCALE: tl.constexpr,
    N_Q: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, Q: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """act [pairs in sorted order, n_cols >= n_rows] = silu(gate x) * (up x). Program (row, pair tile)."""
    tile = tl.program_id(1)
    slot = slot_of_tile(tile, tile_expert, slots, n_experts, n_slots)
    if slot >= 0:
        of_small: tl.constexpr = 2 if FORMAT == INT8 else 1
        page = slot.to(tl.int64) * PAGE
        table = code_table(book)
        row = tl.program_id(0) * R + tl.arange(0, R)
        place = tl.load(tile_first + tile) + tl.arange(0, BT)
        present = place < tl.load(tile_last + tile)
        token = tl.load(order + place, mask=present, other=0).to(tl.int64) // K
        plane_step = n_tokens.to(tl.int64) * N_Q
        gate = words + page // 4 + GATE // 4
        up = words + page // 4 + UP // 4
        gate_scales = small + page // of_small + GATE_SCALES // of_small
        up_scales = small + page // of_small + UP_SCALES // of_small
        g = tl.zeros([R, BT], tl.float32)
        u = tl.zeros([R, BT], tl.float32)
        for start in range(0, N_Q, Q):
            g = add_product(
                g, gate, gate_scales, table, planes, plane_step, token, present, row, n_rows, start,
                N_Q, Q, FORMAT,
            )  # fmt: skip
            u = add_product(
                u, up, up_scales, table, planes, plane_step, token, present, row, n_rows, start,
                N_Q, Q, FORMAT,
            )  # fmt: skip
        if FORMAT != INT8:
            g *= tl.load(singles + page // 4 + GATE_SCALE // 4)
            u *= tl.load(singles + page // 4 + UP_SCALE // 4)
        value = g / (1.0 + tl.exp(-g)) * u
        address = act + place.to(tl.int64)[None, :] * n_cols + row[:, None]
        tl.store(address, value.to(tl.bfloat16), mask=present[None, :] & (row[:, None] < n_rows))


@triton.jit
def down_tiles_kernel(
    planes, order, weights, tile_expert, tile_first, tile_last, slots, words, small, singles, book, out,
    n_pairs, n_experts, n_slots, n_rows,
    PAGE: tl.constexpr, DOWN: tl.constexpr, DOWN_SCALES: tl.constexpr, DOWN_SCALE: tl.constexpr,
    N_Q: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, Q: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """out[pair] = weight * down act, pairs in their own order again. Program (row tile, pair tile).

    Rows of pairs whose expert has no slot are not written.
    """
    tile = tl.program_id(1)
    slot = slot_of_tile(tile, tile_expert, slots, n_experts, n_slots)
    if slot >= 0:
        of_small: tl.constexpr = 2 if FORMAT == INT8 else 1
        page = slot.to(tl.int64) * PAGE
        table = code_table(book)
        row = tl.program_id(0) * R + tl.arange(0, R)
        place = tl.load(tile_first + tile) + tl.arange(0, BT)
        present = place < tl.load(tile_last + tile)
        pair = tl.load(order + place, mask=present, other=0).to(tl.int64)
        plane_step = n_pairs.to(tl.int64) * N_Q
        down = words + page // 4 + DOWN // 4
        scales = small + page // of_small + DOWN_SCALES // of_small
        total = tl.zeros([R, BT], tl.float32)
        for start in range(0, N_Q, Q):
            total = add_product(
                total, down, scales, table, planes, plane_step, place.to(tl.int64), present, row, n_rows,
                start, N_Q, Q, FORMAT,
            )  # fmt: skip
        total *= tl.load(weights + pair, mask=present, other=0.0)[None, :]
        if FORMAT != INT8:
            total *= tl.load(singles + page // 4 + DOWN_SCALE // 4)
        address = out + pair[None, :] * n_rows + row[:, None]
        tl.store(address, total, mask=present[None, :] & (row[:, None] < n_rows))
