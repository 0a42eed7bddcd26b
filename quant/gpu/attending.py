"""Grids and temporary arrays of the attention kernels. Arguments were checked by the face.

How the work is cut follows from shapes and the position alone, so that the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton

from quant.codec import ceil_div
from quant.gpu.attention import attend_kernel, merge_kernel, place_kernel

Tensor = torch.Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Keys of a block by query rows of a program: what the smallest GPU's shared memory holds.
KEYS = {16: 64, 32: 32, 64: 32}
# Query rows of a program at most, by whether tiles are float32: their products take many registers.
QUERY_ROWS = {True: 16, False: 64}
ENOUGH_PROGRAMS = 512
LEAST_KEYS = 256  # of a split
EVERYTHING = 1 << 30  # a window wider than any context


def attend(
    joined: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
    head_dims: tuple[int, int],
    position: int,
    first: int,
    window: int | None,
    sink: Tensor | None,
    scale: float,
    value_scale: float,
) -> Tensor:
    """Rotate, write, attend: joined [n, queries | keys | values] -> [n, heads * d_v] in its type."""
    (n, _), (kv_heads, n_rows, _), (d_k, d_v) = joined.shape, keys.shape, head_dims
    exact, kind = joined.dtype == torch.float32, KINDS[keys.dtype]
    cache = keys, _scales(keys), values, _scales(values)
    q = joined.new_empty(n, heads, d_k)
    widest = triton.next_power_of_2(max(d_k, d_v))
    place_kernel[(n, heads + 2 * kv_heads)](
        joined, cos, sin, q, *cache, position, first, n_rows, value_scale,
        HEADS=heads, KV_HEADS=kv_heads, DK=d_k, DV=d_v, HALF=cos.shape[1], BLOCK=widest, KIND=kind, num_warps=2,
    )  # fmt: skip
    group = triton.next_power_of_2(heads // kv_heads)
    rows = max(16, min(QUERY_ROWS[exact], group * triton.next_power_of_2(n)), group)
    block = 32 if exact else KEYS.get(rows, 32)
    window = EVERYTHING if window is None else window
    lowest, blocks = max(first, position - window + 1), ceil_div(n, rows // group)
    splits, per_split = _splits(blocks * kv_heads, position + n - lowest, block)
    whole = splits == 1
    head, value = 1 << (d_k.bit_length() - 1), max(16, triton.next_power_of_2(d_v))
    out = joined.new_empty(n, heads * d_v)
    parts = out if whole else joined.new_empty(splits, n, heads, d_v, dtype=torch.float32)
    extra = joined.new_empty(2, splits, n, heads, dtype=torch.float32)
    attend_kernel[(blocks, kv_heads, splits)](
        q, *cache, cos if sink is None else sink, parts, extra[0], extra[1],
        n, position, first, n_rows, lowest, per_split, window, scale,
        HEADS=heads, KV_HEADS=kv_heads, DK=d_k, DV=d_v,
        HEAD=head, TAIL=max(16, triton.next_power_of_2(d_k - head)) if d_k > head else 0, VALUE=value,
        GROUP=group, M=rows, N=block, KIND=kind, EXACT=exact, SINK=sink is not None, WHOLE=whole,
        num_warps=4, num_stages=1 if exact else 2,
    )  # fmt: skip
    if not whole:
        merge_kernel[(n * heads,)](
            parts, extra[0], extra[1], cos if sink is None else sink, out, splits, n * heads,
            HEADS=heads, DV=d_v, VALUE=value, SINK=sink is not None, num_warps=1,
        )  # fmt: skip
    return out


def _scales(rows: Tensor) -> Tensor:
    """The cache as float32, where the scales of int8 rows lie; other types have none, and it is never read."""
    return rows.view(-1).view(torch.float32) if rows.dtype == torch.int8 else rows


def _splits(programs: int, n_keys: int, block: int) -> tuple[int, int]:
    """(splits, positions of each, a multiple of a block) so that enough programs run."""
    splits = max(1, min(ENOUGH_PROGRAMS // programs, n_keys // LEAST_KEYS))
    per_split = ceil_div(ceil_div(n_keys, splits), block) * block
    return ceil_div(n_keys, per_split), per_split
