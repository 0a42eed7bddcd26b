"""Grids, paddings and temporary arrays of the matrix and expert kernels, whose arguments `quant.gpu` has checked.

Every size comes from shapes alone, never from a value on the device, so that all of this can be captured in a
CUDA graph (after one run: the first compiles and copies the code book). Tile sizes are constants, not
tuned while running: a configuration chosen by timing could differ between two runs, and with it the
last bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton

from quant.formats import fourbit
from quant.formats.codec import KERNEL_FORMATS, ROW_GROUP, ceil_div, codec
from quant.formats.page import PageLayout
from quant.formats.qtensor import QTensor, row_bands
from quant.gpu.gemv import add_up_kernel, gemv_kernel
from quant.gpu.matmul import down_tiles_kernel, gate_up_tiles_kernel, matmul_kernel
from quant.gpu.routed import down_kernel, gate_up_kernel
from quant.gpu.unpack import BY_SHUFFLE, INT8, dequantize_kernel

Tensor = torch.Tensor

FORMATS = KERNEL_FORMATS
WARPS = 4
LANES_Q = 8 * WARPS  # words of a row that a program's threads cover with one 16-byte load each
UNROLL = 2
ENOUGH_PROGRAMS = 1024  # about eight for each multiprocessor of a large GPU
MIN_WORDS = 128  # per row and split; below, adding up costs more than it brings
GEMV_TOKENS = 2  # per program, see gemv.py
UNPACK_BAND = 1 << 25  # weights unpacked at a time: 64 MiB of bfloat16
# Where lookups are loads, the pipeliner would copy every single one to shared memory ahead of time.
STAGES = 2 if BY_SHUFFLE.value else 1


@dataclass(frozen=True)
class Tile:
    """A tile of the tensor-core kernels: rows of W, tokens, words of a row; warps, shared memory needed."""

    rows: int
    tokens: int
    words: int
    warps: int
    shared_bytes: int


# The largest compiles to 94,208 bytes for capability 8 (limit 101,376 or more), 159,744 for 9.0 (232,448).
TILES = (Tile(64, 16, 32, 4, 0), Tile(64, 64, 16, 4, 0), Tile(128, 128, 16, 8, 94_208))


def interpreted() -> bool:
    """Whether Triton runs these kernels in its interpreter, on the CPU."""
    return not isinstance(gemv_kernel, triton.JITFunction)


@lru_cache(maxsize=64)
def book(name: str, device: torch.device) -> Tensor:
    """The code book on a device, float32 [16]; int8 has none and gets nf4's, which it never reads."""
    return fourbit.book("nf4" if name == "int8" else name).values.to(device)


def words_per_row(name: str, cols: int) -> int:
    """32-bit words of codes per row, padding included."""
    return ceil_div(cols, 64) * 16 if name == "int8" else ceil_div(cols, 32) * 4


def padded_cols(name: str, cols: int) -> int:
    """Columns of all words of a row."""
    return words_per_row(name, cols) * (4 if name == "int8" else 8)


def padded(x: Tensor, name: str) -> Tensor:
    """x [n, cols] with zeros up to the padding of the codec, contiguous, fit to be seen as 64-bit words."""
    missing = padded_cols(name, x.shape[1]) - x.shape[1]
    if missing:
        return F.pad(x, (0, missing))
    return x.contiguous() if x.storage_offset() * x.element_size() % 8 == 0 else x.clone()


def as_planes(x: Tensor, name: str) -> Tensor:
    """x [n, padded cols] -> bfloat16 [8 or 4, n, words]: planes as in `unpack.py`."""
    n, x = x.shape[0], x.to(torch.bfloat16)
    if name == "int8":
        return x.view(n, -1, 4).permute(2, 0, 1).contiguous()
    split = x.view(n, -1, 2, 4, 4).permute(2, 4, 0, 1, 3)  # half, j, n, block, v
    return split.contiguous().view(8, n, -1)


def matrix(q: QTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes as words, scales, tensor scale (int8: its scales again, never read) and code book."""
    codes = q.parts["codes"].reshape(-1).view(torch.int32)
    return codes, q.parts["scales"], q.parts.get("scale", q.parts["scales"]), book(q.codec, q.device)


def split_columns(programs: int, words: int, tile: int) -> tuple[int, int]:
    """(splits, words per split, a multiple of `tile`) so that enough programs run; from the shape alone."""
    splits = max(1, min(ENOUGH_PROGRAMS // programs, words // MIN_WORDS))
    per_split = ceil_div(ceil_div(words, splits), tile) * tile
    return ceil_div(words, per_split), per_split


def gemv(x: Tensor, q: QTensor) -> Tensor:
    """x [n, cols] float32 or bfloat16 -> [n, rows] in x.dtype, every token with the same arithmetic."""
    n, n_rows = x.shape[0], q.shape[0]
    groups, n_q = ceil_div(n_rows, ROW_GROUP), words_per_row(q.codec, q.shape[1])
    splits, per_split = split_columns(groups, n_q, LANES_Q * UNROLL)
    parts = x.new_empty(splits, n, n_rows, dtype=x.dtype if splits == 1 else torch.float32)
    per_program = min(n, GEMV_TOKENS)
    gemv_kernel[(ceil_div(n, per_program), groups, splits)](
        padded(x, q.codec).view(torch.int64), *matrix(q), parts, n, n_rows,
        N_Q=n_q, PER_SPLIT=per_split, T=per_program, Q=LANES_Q, UNROLL=UNROLL,
        FORMAT=FORMATS[q.codec], BF16=x.dtype == torch.bfloat16, num_warps=WARPS,
    )  # fmt: skip
    return parts[0] if splits == 1 else add_splits(parts, x.dtype)


def tensor_cores(x: Tensor, q: QTensor) -> Tensor:
    """x [n, cols] bfloat16 -> [n, rows] bfloat16 through unpacked tiles."""
    n, n_rows = x.shape[0], q.shape[0]
    n_q, tile = words_per_row(q.codec, q.shape[1]), tile_for(n, x.device)
    grid = ceil_div(n, tile.tokens), ceil_div(n_rows, tile.rows)
    splits, per_split = split_columns(grid[0] * grid[1], n_q, tile.words)
    parts = x.new_empty(splits, n, n_rows, dtype=x.dtype if splits == 1 else torch.float32)
    matmul_kernel[(*grid, splits)](
        as_planes(padded(x, q.codec), q.codec), *matrix(q), parts, n, n_rows,
        N_Q=n_q, PER_SPLIT=per_split, R=tile.rows, BT=tile.tokens, Q=tile.words,
        FORMAT=FORMATS[q.codec], num_warps=tile.warps, num_stages=STAGES,
    )  # fmt: skip
    return parts[0] if splits == 1 else add_splits(parts, x.dtype)


def unpacked(x: Tensor, q: QTensor) -> Tensor:
    """x [n, cols] -> [n, rows] in x.dtype: W unpacked to x.dtype band by band, then the library's matmul."""
    out = x.new_empty(x.shape[0], q.shape[0])
    for start, stop in row_bands(q.shape, codec(q.codec).row_step, UNPACK_BAND):
        out[:, start:stop] = F.linear(x, dequantize(q.rows(start, stop), x.dtype))
    return out


def dequantize(q: QTensor, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, cols], row-major."""
    n_rows, n_cols = q.shape
    n_q = words_per_row(q.codec, n_cols)
    out = torch.empty(n_rows, n_cols, dtype=dtype, device=q.device)
    dequantize_kernel[(ceil_div(n_rows, ROW_GROUP), ceil_div(n_q, LANES_Q))](
        *matrix(q), out, n_rows, n_cols, n_q, Q=LANES_Q, FORMAT=FORMATS[q.codec], num_warps=WARPS
    )
    return out


def add_up(parts: Tensor, y: Tensor, n_parts: int, outer: int, inner: int) -> Tensor:
    """y [n, cols] = sum over p of the rows of parts at row * outer + p * inner elements, first to last."""
    n, n_cols = y.shape
    add_up_kernel[(n, ceil_div(n_cols, 1024))](parts, y, n_cols, outer, inner, N_PARTS=n_parts, BLOCK=1024)
    return y


def add_splits(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[splits, n, rows] -> [n, rows]."""
    splits, n, n_rows = parts.shape
    return add_up(parts, parts.new_empty(n, n_rows, dtype=dtype), splits, n_rows, n * n_rows)


def combine(rows: Tensor) -> Tensor:
    """[n, k, hidden] float32 -> [n, hidden]: a token's experts added in the order of their places."""
    n, k, hidden = rows.shape
    return add_up(rows, rows.new_empty(n, hidden), k, k * hidden, hidden)


def tile_for(tokens: int, device: torch.device) -> Tile:
    """The smallest tile that holds `tokens`, or the largest that the device has shared memory for."""
    fitting = [tile for tile in TILES if tile.shared_bytes <= shared_bytes(device)]
    return next((tile for tile in fitting if tokens <= tile.tokens), fitting[-1])


@lru_cache(maxsize=64)
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take; the interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@lru_cache(maxsize=16)
def offsets(layout: PageLayout) -> dict[str, int]:
    """Kernel constant -> byte offset in a page: GATE, GATE_SCALES, GATE_SCALE and so on; 0 for none."""
    at = {f"{s.matrix}.{s.part}": s.offset for s in layout.slices}
    suffixes = {"codes": "", "scales": "_SCALES", "scale": "_SCALE"}
    return {
        matrix.upper() + suffix: at.get(f"{matrix}.{part}", 0)
        for matrix in ("gate", "up", "down")
        for part, suffix in suffixes.items()
    }


def constants(layout: PageLayout, *matrices: str) -> dict[str, int]:
    """Offsets of some matrices and what else is fixed by the layout."""
    chosen = {name: at for name, at in offsets(layout).items() if name.split("_")[0].lower() in matrices}
    cols = layout.shape(matrices[0])[1]
    return {
        **chosen,
        "PAGE": layout.bytes,
        "N_Q": words_per_row(layout.codec, cols),
        "FORMAT": FORMATS[layout.codec],
    }


def views(slab: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slab as words, as scales, as float32, and the code book."""
    flat = slab.view(-1)
    small = flat.view(torch.float16) if FORMATS[layout.codec] == INT8.value else flat
    return flat.view(torch.int32), small, flat.view(torch.float32), book(layout.codec, slab.device)


def inner_rows(n: int, layout: PageLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for n rows of silu(gate x) * (up x), the padding of the down projection zeroed."""
    cols = padded_cols(layout.codec, layout.inner)
    make = torch.empty if cols == layout.inner else torch.zeros
    return make(n, cols, dtype=dtype, device=device)


def few_tokens(
    x: Tensor, layout: PageLayout, slab: Tensor, slots: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Routed experts, a program per pair and row group -> weighted outputs float32 [n, k, hidden]."""
    (n, k), n_experts, n_slots = chosen.shape, slots.numel(), slab.shape[0]
    memory, bf16 = views(slab, layout), x.dtype == torch.bfloat16
    act = inner_rows(n * k, layout, x.dtype, x.device)
    gate_up_kernel[(n * k, ceil_div(layout.inner, ROW_GROUP))](
        padded(x, layout.codec).view(torch.int64), chosen, slots, *memory, act,
        n_experts, n_slots, layout.inner, act.shape[1],
        K=k, **constants(layout, "gate", "up"), Q=LANES_Q, UNROLL=UNROLL, BF16=bf16, num_warps=WARPS,
    )  # fmt: skip
    rows = torch.empty(n, k, layout.hidden, device=x.device)
    down_kernel[(n * k, ceil_div(layout.hidden, ROW_GROUP))](
        act.view(torch.int64), chosen, weights, slots, *memory, rows, n_experts, n_slots, layout.hidden,
        **constants(layout, "down"), Q=LANES_Q, UNROLL=UNROLL, BF16=bf16, num_warps=WARPS,
    )  # fmt: skip
    return rows


def many_tokens(
    x: Tensor, layout: PageLayout, slab: Tensor, slots: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Routed experts, tokens sorted by expert, on the tensor cores -> weighted outputs float32 [n, k,
    hidden].
    """
    (n, k), n_experts, n_slots = chosen.shape, slots.numel(), slab.shape[0]
    memory = views(slab, layout)
    tile = tile_for(ceil_div(n * k, n_experts), x.device)
    order, *tiles = sorted_tiles(chosen, n_experts, tile.tokens)
    shape = {"R": tile.rows, "BT": tile.tokens, "Q": tile.words}
    shape |= {"num_warps": tile.warps, "num_stages": STAGES}
    act = inner_rows(n * k, layout, torch.bfloat16, x.device)
    gate_up_tiles_kernel[(ceil_div(layout.inner, tile.rows), tiles[0].numel())](
        as_planes(padded(x, layout.codec), layout.codec), order, *tiles, slots, *memory, act,
        n, n_experts, n_slots, layout.inner, act.shape[1], K=k, **constants(layout, "gate", "up"), **shape,
    )  # fmt: skip
    rows = torch.zeros(n, k, layout.hidden, device=x.device)
    down_tiles_kernel[(ceil_div(layout.hidden, tile.rows), tiles[0].numel())](
        as_planes(act, layout.codec), order, weights, *tiles, slots, *memory, rows,
        n * k, n_experts, n_slots, layout.hidden, **constants(layout, "down"), **shape,
    )  # fmt: skip
    return rows


def sorted_tiles(chosen: Tensor, n_experts: int, per_tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs sorted by expert, and for each tile of them: expert, first pair, end of the expert's pairs.

    int32 tensors, made without asking the device anything: there are as many tiles as any routing could need,
    and those that this one does not get the expert `n_experts`, which does not exist.
    """
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    experts = torch.arange(n_experts + 1, device=chosen.device, dtype=flat.dtype)
    starts = torch.searchsorted(flat[order], experts)
    n_tiles = (starts.diff() + per_tile - 1) // per_tile
    ends = n_tiles.cumsum(0)
    tile = torch.arange(flat.numel() // per_tile + min(n_experts, flat.numel()), device=chosen.device)
    expert = torch.searchsorted(ends, tile, right=True)
    known = expert.clamp(max=n_experts - 1)
    first = starts[known] + (tile - (ends - n_tiles)[known]) * per_tile
    return order.int(), expert.int(), first.int(), starts[known + 1].int()
