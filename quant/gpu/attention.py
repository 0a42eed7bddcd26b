"""Attention over a cache of keys and values, ring or row: rotated, written, attended to, with a window and a sink.

The first kernel rotates the new queries and keys and writes keys and values into their rows of the cache. The
second goes through the cache in blocks of keys under a running maximum, with the heads that share keys side by
side in one tile, and stretches of keys on different processors where there are few queries; the third adds those
stretches up, first to last, the sink behind them. Keys of 192 are two tiles of a power of two, 128 and 64. Rows
of int8 end with their scale, which multiplies logits and weights, so that codes go to the tensor cores as they
are. Position p lies in row (p - first) mod rows. Nothing is timed or tuned at run time.

It must not know layers or sequences.
"""

# ruff: noqa: N803  (constants of a kernel are in capitals; branches on them are for the compiler)
from __future__ import annotations

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
INT8 = tl.constexpr(2)
NOTHING = tl.constexpr(-1e30)  # a maximum over no logits
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits behind the point


@triton.jit
def store_row(cache, scales, row, value, d, D: tl.constexpr, KIND: tl.constexpr):
    """One row of the cache, in its type. row: its number over all heads."""
    if KIND == INT8:
        inside = d < D
        most = tl.max(tl.abs(tl.where(inside, value, 0.0)), 0)
        factor = tl.where(most > 1e-30, 127.0 / most, 0.0)
        code = value * factor + ROUNDING - ROUNDING
        tl.store(cache + row * (D + 4) + d, code.to(tl.int8), mask=inside)
        tl.store(scales + (row * (D + 4) + D) // 4, most / 127.0)
    else:
        tl.store(cache + row * D + d, value.to(cache.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["position", "first", "n_rows"])
def place_kernel(
    joined, cos, sin, q, keys, key_scales, values, value_scales, position, first, n_rows, value_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Program (token, head): a query to q [n, HEADS, DK], or a key or value to the cache [KV_HEADS, n_rows, ...].

    joined [n, queries | keys | values]; cos and sin [n, HALF] turn the dimensions i and i + HALF.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    width = (HEADS + KV_HEADS) * DK + KV_HEADS * DV
    row = (position + token - first) % n_rows
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
            store_row(keys, key_scales, (head - HEADS) * n_rows + row, x, d, DK, KIND)
    else:
        kv = head - HEADS - KV_HEADS
        at = joined + token * width + (HEADS + KV_HEADS) * DK + kv * DV
        v = tl.load(at + d, mask=d < DV, other=0.0).to(tl.float32) * value_scale
        store_row(values, value_scales, kv * n_rows + row, v, d, DV, KIND)


@triton.jit
def cached(cache, row, d, present, D: tl.constexpr, KIND: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Dimensions d of rows [N], as [N, d] or [d, N]."""
    step = D + 4 if KIND == INT8 else D
    if TRANSPOSED:
        there = row[None, :] * step + d[:, None]
        inside = present[None, :] & (d < D)[:, None]
    else:
        there = row[:, None] * step + d[None, :]
        inside = present[:, None] & (d < D)[None, :]
    tile = tl.load(cache + there, mask=inside, other=0)
    return tile.to(tl.float32) if KIND == INT8 else tile


@triton.jit
def product(a, b, total, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)


@triton.jit(do_not_specialize=["n_tokens", "position", "first", "n_rows", "lowest", "per_split"])
def attend_kernel(
    q, keys, key_scales, values, value_scales, sink, out, maxima, sums,
    n_tokens, position, first, n_rows, lowest, per_split, window, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    KIND: tl.constexpr, EXACT: tl.constexpr, SINK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, head of keys, split): M query rows against per_split positions from `lowest` on.

    A query row is a token and one of the GROUP (a power of two) heads that share keys. WHOLE: there is one split, out
    [n, HEADS, DV] is final; else out [splits, n, HEADS, DV] with maxima and sums [splits, n, HEADS].
    """
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
        row = kv.to(tl.int64) * n_rows + (p - first) % n_rows
        k1 = cached(keys, row, d1, present, DK, KIND, True)
        logits = product(q1, k1, tl.zeros([M, N], tl.float32), EXACT)
        if TAIL > 0:
            k2 = cached(keys, row, d2, present, DK, KIND, True)
            logits = product(q2, k2, logits, EXACT)
        logits *= scale
        if KIND == INT8:
            logits *= tl.load(key_scales + (row * (DK + 4) + DK) // 4, mask=present, other=0.0)[None, :]
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
        if KIND == INT8:
            weights *= tl.load(value_scales + (row * (DV + 4) + DV) // 4, mask=present, other=0.0)[None, :]
        mixed = product(weights, cached(values, row, dv, present, DV, KIND, False), mixed, EXACT)
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
    else:
        where += split.to(tl.int64) * n_tokens * HEADS
        tl.store(out + where[:, None] * DV + dv[None, :], mixed, mask=there)
        tl.store(maxima + where, most, mask=known)
        tl.store(sums + where, total, mask=known)


@triton.jit(do_not_specialize=["n_splits", "n_rows"])
def merge_kernel(
    parts, maxima, sums, sink, out, n_splits, n_rows,
    HEADS: tl.constexpr, DV: tl.constexpr, VALUE: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Program (query row): the stretches of keys together, first to last, and the sink."""
    row = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, VALUE)
    most = tl.full([1], NOTHING, tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([VALUE], tl.float32)
    one = tl.arange(0, 1)
    at = row
    for _ in range(n_splits):
        here = tl.load(maxima + at + one)
        higher = tl.maximum(most, here)
        shrink, grow = tl.exp(most - higher), tl.exp(here - higher)
        mixed = mixed * shrink + tl.load(parts + at * DV + dv, mask=dv < DV, other=0.0) * grow
        total = total * shrink + tl.load(sums + at + one) * grow
        most = higher
        at += n_rows
    if SINK:
        extra = tl.load(sink + row % HEADS + one)
        higher = tl.maximum(most, extra)
        shrink = tl.exp(most - higher)
        mixed *= shrink
        total = total * shrink + tl.exp(extra - higher)
    tl.store(out + row * DV + dv, (mixed / total).to(out.dtype.element_ty), mask=dv < DV)
