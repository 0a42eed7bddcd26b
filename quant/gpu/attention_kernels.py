"""Attention over a cache of keys and values, ring or row: rotated, written, attended to, with a window and a sink.

The first kernel rotates the new queries and keys and writes keys and values into their rows of the cache. The
second goes through the cache in blocks of keys under a running maximum, with the heads that share keys side by
side in one tile, and with splits of the keys on different processors where there are few queries; the third adds the
splits up, first to last, then the sink. Keys of 192 are two tiles of a power of two, 128 and 64. Rows
of int8 end with their scale, which multiplies logits and weights, so that codes go to the tensor cores as they
are. Position p is in row (p - first) mod rows; or, with a table, in row p mod rows of a block, the table saying in
which slot of a slab that block is. The position of the first token is read on the device, and how the keys are cut
follows from it there, so that a captured graph goes on as the sequence grows. Nothing is timed or tuned at run time.

It must not know layers or sequences.
"""

# ruff: noqa: N803, RET505  (constants of a kernel are in capitals; branches on them are for the compiler)
from __future__ import annotations

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
INT8 = tl.constexpr(2)
NOTHING = tl.constexpr(-1e30)  # a maximum over no logits
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits behind the point
MIN_KEYS = tl.constexpr(256)  # of a split


@triton.jit
def row_start(p, kv, table, present, first, n_rows, slot_step, STEP: tl.constexpr, PAGED: tl.constexpr):
    """Where the row of position p of head kv begins, in elements; int64."""
    if PAGED:
        slot = tl.load(table + p // n_rows, mask=present, other=0).to(tl.int64)
        return slot * slot_step + (kv * n_rows + p % n_rows).to(tl.int64) * STEP
    else:
        return (kv * n_rows + (p - first) % n_rows).to(tl.int64) * STEP


@triton.jit
def cut(n_keys, max_splits, N: tl.constexpr):
    """Positions of each split, a multiple of N: as many splits as there are keys for, up to `max_splits`."""
    splits = tl.minimum(tl.maximum(n_keys // MIN_KEYS, 1), max_splits)
    return tl.cdiv(tl.cdiv(n_keys, splits), N) * N


@triton.jit
def store_row(cache, scales, start, value, d, D: tl.constexpr, KIND: tl.constexpr):
    """One row of the cache, in its type. start: where it begins, in elements."""
    if KIND == INT8:
        inside = d < D
        most = tl.max(tl.abs(tl.where(inside, value, 0.0)), 0)
        factor = tl.where(most > 1e-30, 127.0 / most, 0.0)
        code = value * factor + ROUNDING - ROUNDING
        tl.store(cache + start + d, code.to(tl.int8), mask=inside)
        tl.store(scales + (start + D) // 4, most / 127.0)
    else:
        tl.store(cache + start + d, value.to(cache.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["first", "n_rows"])
def place_kernel(
    joined, cos, sin, q, keys, key_scales, values, value_scales, positions, table,
    first, n_rows, slot_step, value_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, KIND: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Program (token, head): a query to q [n, HEADS, DK], or a key or value to the cache [KV_HEADS, n_rows, ...].

    joined [n, queries | keys | values]; cos and sin [n, HALF] turn the dimensions i and i + HALF.
    """
    extra: tl.constexpr = 4 if KIND == INT8 else 0
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    width = (HEADS + KV_HEADS) * DK + KV_HEADS * DV
    p = tl.load(positions).to(tl.int32) + tl.program_id(0)
    d = tl.arange(0, BLOCK)
    if head < HEADS + KV_HEADS:
        at = joined + token * width + head * DK
        turned = d < 2 * HALF
        other = tl.where(d < HALF, d + HALF, d - HALF)
        angle = tl.where(d < HALF, d, d - HALF)
        x = tl.load(at + d, mask=d < DK, other=0.0).to(tl.float32)
        y = tl.load(at + other, mask=turned, other=0.0).to(tl.float32)
        c = tl.load(cos + token * HALF + angle, mask=turned, other=1.0)
        s = tl.load(sin + token * HALF + angle, mask=turned, other=0.0)
        x = x * c + tl.where(d < HALF, -y, y) * s
        if head < HEADS:
            tl.store(q + (token * HEADS + head) * DK + d, x.to(q.dtype.element_ty), mask=d < DK)
        else:
            start = row_start(p, head - HEADS, table, True, first, n_rows, slot_step, DK + extra, PAGED)
            store_row(keys, key_scales, start, x, d, DK, KIND)
    else:
        kv = head - HEADS - KV_HEADS
        at = joined + token * width + (HEADS + KV_HEADS) * DK + kv * DV
        v = tl.load(at + d, mask=d < DV, other=0.0).to(tl.float32) * value_scale
        start = row_start(p, kv, table, True, first, n_rows, slot_step, DV + extra, PAGED)
        store_row(values, value_scales, start, v, d, DV, KIND)


@triton.jit
def cached(cache, start, d, present, D: tl.constexpr, KIND: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Dimensions d of the rows that begin at start [N], as [N, d] or [d, N]."""
    if TRANSPOSED:
        there = start[None, :] + d[:, None]
        inside = present[None, :] & (d < D)[:, None]
    else:
        there = start[:, None] + d[None, :]
        inside = present[:, None] & (d < D)[None, :]
    tile = tl.load(cache + there, mask=inside, other=0)
    return tile.to(tl.float32) if KIND == INT8 else tile


@triton.jit
def product(a, b, total, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)


@triton.jit(do_not_specialize=["n_tokens", "first", "n_rows", "most_splits"])
def attend_kernel(
    q, keys, key_scales, values, value_scales, positions, table, sink, out, maxima, sums,
    n_tokens, first, n_rows, slot_step, max_splits, window, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    KIND: tl.constexpr, EXACT: tl.constexpr, SINK: tl.constexpr, WHOLE: tl.constexpr,
    PAGED: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, head of keys, split): M query rows against a split of the positions that are seen.

    A query row is a token and one of the GROUP (a power of two) heads that share keys. WHOLE: there is one split, out
    [n, HEADS, DV] is final; else out [most_splits, n, HEADS, DV] with maxima and sums [most_splits, n, HEADS]; splits
    that have no position write nothing.
    """
    extra: tl.constexpr = 4 if KIND == INT8 else 0
    position = tl.load(positions).to(tl.int32)
    lowest = tl.maximum(first, position - window + 1)
    per_split = cut(position + n_tokens - lowest, max_splits, N)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    m = tl.arange(0, M)
    token = tl.program_id(0) * (M // GROUP) + m // GROUP
    heads_each: tl.constexpr = HEADS // KV_HEADS
    head = kv * heads_each + m % GROUP
    known = (token < n_tokens) & (m % GROUP < heads_each)
    where = token.to(tl.int64) * HEADS + head
    seen_from = position + token - window + 1
    d1 = tl.arange(0, HEAD)
    q1 = tl.load(q + where[:, None] * DK + d1[None, :], mask=known[:, None], other=0.0)
    if TAIL > 0:
        d2 = HEAD + tl.arange(0, TAIL)
        q2 = tl.load(
            q + where[:, None] * DK + d2[None, :], mask=known[:, None] & (d2 < DK)[None, :], other=0.0
        )
    dv = tl.arange(0, VALUE)
    first_token = tl.program_id(0) * (M // GROUP)
    last = position + tl.minimum(first_token + M // GROUP, n_tokens)  # one past what any of these sees
    begin = tl.maximum(
        lowest + split * per_split, tl.maximum(position + first_token - window + 1, 0) // N * N
    )
    begin = tl.maximum(begin, lowest)
    end = tl.minimum(lowest + (split + 1) * per_split, last)
    most = tl.full([M], NOTHING, tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, VALUE], tl.float32)
    for start in range(begin, end, N):
        p = start + tl.arange(0, N)
        present = p < end
        key = row_start(p, kv, table, present, first, n_rows, slot_step, DK + extra, PAGED)
        k1 = cached(keys, key, d1, present, DK, KIND, True)
        logits = product(q1, k1, tl.zeros([M, N], tl.float32), EXACT)
        if TAIL > 0:
            k2 = cached(keys, key, d2, present, DK, KIND, True)
            logits = product(q2, k2, logits, EXACT)
        logits *= scale
        if KIND == INT8:
            logits *= tl.load(key_scales + (key + DK) // 4, mask=present, other=0.0)[None, :]
        visible = (
            present[None, :]
            & (p[None, :] <= (position + token)[:, None])
            & (p[None, :] >= seen_from[:, None])
        )
        logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        weights = tl.exp(logits - higher[:, None])
        shrink = tl.exp(most - higher)
        total = total * shrink + tl.sum(weights, 1)
        mixed *= shrink[:, None]
        value = row_start(p, kv, table, present, first, n_rows, slot_step, DV + extra, PAGED)
        if KIND == INT8:
            weights *= tl.load(value_scales + (value + DV) // 4, mask=present, other=0.0)[None, :]
        mixed = product(weights, cached(values, value, dv, present, DV, KIND, False), mixed, EXACT)
        most = higher
    there = known[:, None] & (dv < DV)[None, :]
    if WHOLE:
        if SINK:
            extra = tl.load(sink + head, mask=known, other=0.0)
            higher = tl.maximum(most, extra)
            shrink = tl.exp(most - higher)
            mixed *= shrink[:, None]
            total = total * shrink + tl.exp(extra - higher)
        total = tl.where(known, total, 1.0)
        tl.store(
            out + where[:, None] * DV + dv[None, :],
            (mixed / total[:, None]).to(out.dtype.element_ty),
            mask=there,
        )
    elif lowest + split * per_split < position + n_tokens:
        where += split.to(tl.int64) * n_tokens * HEADS
        tl.store(out + where[:, None] * DV + dv[None, :], mixed, mask=there)
        tl.store(maxima + where, most, mask=known)
        tl.store(sums + where, total, mask=known)


@triton.jit(do_not_specialize=["n_tokens", "first", "most_splits"])
def merge_kernel(
    parts, maxima, sums, positions, sink, out, n_tokens, first, max_splits, window,
    HEADS: tl.constexpr, DV: tl.constexpr, VALUE: tl.constexpr, N: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Program (query row): the splits of the keys added up, first to last, and the sink."""
    position = tl.load(positions).to(tl.int32)
    n_keys = position + n_tokens - tl.maximum(first, position - window + 1)
    n_splits = tl.cdiv(n_keys, cut(n_keys, max_splits, N))
    row = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, VALUE)
    most = tl.full([1], NOTHING, tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([VALUE], tl.float32)
    one = tl.arange(0, 1)
    at = row
    for _ in range(n_splits):
        part_most = tl.load(maxima + at + one)
        higher = tl.maximum(most, part_most)
        shrink, grow = tl.exp(most - higher), tl.exp(part_most - higher)
        mixed = mixed * shrink + tl.load(parts + at * DV + dv, mask=dv < DV, other=0.0) * grow
        total = total * shrink + tl.load(sums + at + one) * grow
        most = higher
        at += n_tokens * HEADS
    if SINK:
        extra = tl.load(sink + row % HEADS + one)
        higher = tl.maximum(most, extra)
        shrink = tl.exp(most - higher)
        mixed *= shrink
        total = total * shrink + tl.exp(extra - higher)
    tl.store(out + row * DV + dv, (mixed / total).to(out.dtype.element_ty), mask=dv < DV)
