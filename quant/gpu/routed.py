"""The routed experts of a few tokens, straight from the pages in a slab: two launches for a whole layer.

A "pair" is one token's place in its list of chosen experts; every pair has its own row of output, so nothing
is added across programs and the order of summation is fixed. Which slot holds an expert is read from the slot
table on the device: nothing is copied to the host, no shape depends on the routing, and a CUDA graph can hold the
launches. An expert without a slot (-1, or anything that is no slot) costs one early exit and leaves zeros.

Programs are numbered pair first, so that the same rows of all pairs run side by side: where two tokens chose
one expert the second reads its page from the second-level cache.

Pages are uint8 [n_slots, page bytes]; the kernels get the same memory as 32-bit words, bytes, float16 and
float32.
"""

# ruff: noqa: N803  (constants of a kernel are in capitals; branches on them are for the compiler)
from __future__ import annotations

import triton
import triton.language as tl

from quant.gpu.gemv import input_tiles, quads_per_row, word_sums
from quant.gpu.unpack import INT8, code_table, scale_index


@triton.jit
def slot_of(pair, chosen, slots, n_experts, n_slots):
    """The slot of a pair's expert, -1 where it has none; wrong numbers in either table read nothing."""
    expert = tl.load(chosen + pair)
    known = (expert >= 0) & (expert < n_experts)
    slot = tl.load(slots + tl.where(known, expert, 0), mask=known, other=-1)
    return tl.where(slot < n_slots, slot, -1)


@triton.jit
def gate_up_kernel(
    x, chosen, slots, words, small, singles, book, act, n_experts, n_slots, n_rows, n_cols,
    K: tl.constexpr, PAGE: tl.constexpr,
    GATE: tl.constexpr, GATE_SCALES: tl.constexpr, GATE_SCALE: tl.constexpr,
    UP: tl.constexpr, UP_SCALES: tl.constexpr, UP_SCALE: tl.constexpr,
    N_Q: tl.constexpr, Q: tl.constexpr, UNROLL: tl.constexpr, FORMAT: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """act [pairs, n_cols >= n_rows] = silu(gate x) * (up x), 16 rows of a pair. Program (pair, group).

    words, small (bytes, or float16 for int8), singles (float32): the slab. PAGE and the offsets are in bytes.
    """
    pair = tl.program_id(0)
    slot = slot_of(pair, chosen, slots, n_experts, n_slots)
    if slot >= 0:
        group = tl.program_id(1)
        table = code_table(book)
        page = slot.to(tl.int64) * PAGE
        of_small: tl.constexpr = 2 if FORMAT == INT8 else 1
        per_group = group * scale_index(N_Q, 0, 0, FORMAT)
        gate = words + page // 4 + GATE // 4 + group * N_Q * 16
        up = words + page // 4 + UP // 4 + group * N_Q * 16
        gate_scales = small + page // of_small + GATE_SCALES // of_small + per_group
        up_scales = small + page // of_small + UP_SCALES // of_small + per_group
        gates = tl.zeros([1, Q, 16], tl.float32)
        ups = tl.zeros([1, Q, 16], tl.float32)
        row = (pair // K) * quads_per_row(N_Q, FORMAT)
        for start in range(0, N_Q, Q * UNROLL):
            for step in tl.static_range(UNROLL):
                q = start + step * Q + tl.arange(0, Q)
                inside = q < N_Q
                low, high = input_tiles(x, row, q[None, :], inside[None, :], FORMAT, BF16)
                gates += word_sums(gate, gate_scales, table, low, high, q, inside, FORMAT)
                ups += word_sums(up, up_scales, table, low, high, q, inside, FORMAT)
        g = tl.sum(gates, 1)
        u = tl.sum(ups, 1)
        if FORMAT != INT8:
            g *= tl.load(singles + page // 4 + GATE_SCALE // 4)
            u *= tl.load(singles + page // 4 + UP_SCALE // 4)
        rows = group * 16 + tl.arange(0, 16)[None, :]
        value = g / (1.0 + tl.exp(-g)) * u
        tl.store(act + pair * n_cols + rows, value.to(act.dtype.element_ty), mask=rows < n_rows)


@triton.jit
def down_kernel(
    act, chosen, weights, slots, words, small, singles, book, out, n_experts, n_slots, n_rows,
    PAGE: tl.constexpr, DOWN: tl.constexpr, DOWN_SCALES: tl.constexpr, DOWN_SCALE: tl.constexpr,
    N_Q: tl.constexpr, Q: tl.constexpr, UNROLL: tl.constexpr, FORMAT: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """out[pair, 16 rows] = weight * (down act[pair]), zeros where the expert has no slot. Program (pair,
    group).
    """
    pair = tl.program_id(0)
    group = tl.program_id(1)
    slot = slot_of(pair, chosen, slots, n_experts, n_slots)
    sums = tl.zeros([1, 16], tl.float32)
    if slot >= 0:
        table = code_table(book)
        page = slot.to(tl.int64) * PAGE
        of_small: tl.constexpr = 2 if FORMAT == INT8 else 1
        down = words + page // 4 + DOWN // 4 + group * N_Q * 16
        scales = small + page // of_small + DOWN_SCALES // of_small + group * scale_index(N_Q, 0, 0, FORMAT)
        total = tl.zeros([1, Q, 16], tl.float32)
        row = pair * quads_per_row(N_Q, FORMAT)
        for start in range(0, N_Q, Q * UNROLL):
            for step in tl.static_range(UNROLL):
                q = start + step * Q + tl.arange(0, Q)
                inside = q < N_Q
                low, high = input_tiles(act, row, q[None, :], inside[None, :], FORMAT, BF16)
                total += word_sums(down, scales, table, low, high, q, inside, FORMAT)
        sums = tl.sum(total, 1) * tl.load(weights + pair)
        if FORMAT != INT8:
            sums *= tl.load(singles + page // 4 + DOWN_SCALE // 4)
    rows = group * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + pair.to(tl.int64) * n_rows + rows, sums, mask=rows < n_rows)
