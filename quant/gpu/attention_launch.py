"""Grids and temporary arrays of the attention kernels, whose arguments `quant.gpu.attend` has checked.

How the work is cut follows from shapes and the position alone, so that the same input gives the same bits. Grids follow
from shapes alone: the position is known to the device only.
"""

from __future__ import annotations

import torch
import triton

from quant.formats.codec import ceil_div
from quant.gpu.attention_kernels import MIN_KEYS, attend_kernel, merge_kernel, place_kernel

Tensor = torch.Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Keys of a block by query rows of a program: what the smallest GPU's shared memory holds.
KEYS = {16: 64, 32: 32, 64: 32}
# Query rows of a program at most, by whether tiles are float32: their products take many registers.
QUERY_ROWS = {True: 16, False: 64}
ENOUGH_PROGRAMS = 512
EVERYTHING = 1 << 30  # a window wider than any context


def attend(
    joined: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    positions: Tensor,
    table: Tensor | None,
    heads: int,
    head_dims: tuple[int, int],
    first: int,
    window: int | None,
    sink: Tensor | None,
    scale: float,
    value_scale: float,
) -> Tensor:
    """Rotate, write, attend: joined [n, queries | keys | values] -> [n, heads * d_v] in its type."""
    n, (kv_heads, n_rows), (d_k, d_v) = joined.shape[0], keys.shape[-3:-1], head_dims
    exact, kind, paged = joined.dtype == torch.float32, KINDS[keys.dtype], table is not None
    cache = keys, _scales(keys), values, _scales(values)
    table, slot_step = (
        (positions, 0) if table is None else (table, keys.stride(0))
    )  # without one it is never read
    sinks = cos if sink is None else sink
    q = joined.new_empty(n, heads, d_k)
    widest = triton.next_power_of_2(max(d_k, d_v))
    place_kernel[(n, heads + 2 * kv_heads)](
        joined, cos, sin, q, *cache, positions, table, first, n_rows, slot_step, value_scale,
        HEADS=heads, KV_HEADS=kv_heads, DK=d_k, DV=d_v, HALF=cos.shape[1], BLOCK=widest, KIND=kind, PAGED=paged,
        num_warps=2,
    )  # fmt: skip
    group = triton.next_power_of_2(heads // kv_heads)
    rows = max(16, min(QUERY_ROWS[exact], group * triton.next_power_of_2(n)), group)
    block = 32 if exact else KEYS.get(rows, 32)
    capacity = n_rows * (table.numel() if paged else 1)
    window = EVERYTHING if window is None else window
    blocks = ceil_div(n, rows // group)
    splits = max_splits(blocks * kv_heads, min(capacity, window + n - 1))
    whole = splits == 1
    head, value = 1 << (d_k.bit_length() - 1), max(16, triton.next_power_of_2(d_v))
    out = joined.new_empty(n, heads * d_v)
    parts = out if whole else joined.new_empty(splits, n, heads, d_v, dtype=torch.float32)
    extra = joined.new_empty(2, splits, n, heads, dtype=torch.float32)
    attend_kernel[(blocks, kv_heads, splits)](
        q, *cache, positions, table, sinks, parts, extra[0], extra[1],
        n, first, n_rows, slot_step, splits, window, scale,
        HEADS=heads, KV_HEADS=kv_heads, DK=d_k, DV=d_v,
        HEAD=head, TAIL=max(16, triton.next_power_of_2(d_k - head)) if d_k > head else 0, VALUE=value,
        GROUP=group, M=rows, N=block, KIND=kind, EXACT=exact, SINK=sink is not None, WHOLE=whole, PAGED=paged,
        num_warps=4, num_stages=1 if exact else 2,
    )  # fmt: skip
    if not whole:
        merge_kernel[(n * heads,)](
            parts, extra[0], extra[1], positions, sinks, out, n, first, splits, window,
            HEADS=heads, DV=d_v, VALUE=value, N=block, SINK=sink is not None, num_warps=1,
        )  # fmt: skip
    return out


def _scales(rows: Tensor) -> Tensor:
    """The cache as float32, where the scales of int8 rows are; other types have none, and it is never read."""
    return rows.view(torch.float32) if rows.dtype == torch.int8 else rows


def max_splits(programs: int, n_keys: int) -> int:
    """Splits of the keys for different processors, so that enough programs run: at most n_keys are ever seen."""
    return max(1, min(ENOUGH_PROGRAMS // programs, n_keys // MIN_KEYS.value))
