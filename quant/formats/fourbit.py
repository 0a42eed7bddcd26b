"""The four-bit codecs in torch: scale search, nearest codes, packing, and the way back. The reference.

A block of 16 or 32 columns shares one scale byte, chosen by least squared error among a few candidates around
the one that just covers the largest magnitude. nf4 scales are float8 e4m3 times one float32 per matrix and
may be negative, which turns the lopsided book around; mxfp4 scales are powers of two.

Everything but the final sums is element by element, so the bytes depend neither on the number of threads nor
on how a matrix was cut into bands. Works on chunks that fit the cache. It must not know files, names or
models.

Sources: the NF4 values are bitsandbytes' (Dettmers et al. 2023, QLoRA, appendix E); E2M1 and E8M0 are those
of the OCP Microscaling Formats specification 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from quant.formats.codec import ROW_GROUP, Codec
from quant.formats.distortion import sum_of_squares

Tensor = torch.Tensor

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_CODES = (*FP4_VALUES, *(-v for v in FP4_VALUES))

CHUNK = 1 << 16  # weights in flight per thread: a few float32 arrays of this size fit a level-2 cache
N_CELLS = 1024  # of the lookup table that finds the nearest code; narrower than half the closest two values
NF4_TOP = 256.0  # the tensor scale puts the largest magnitude here; e4m3 reaches 448, which leaves larger candidates
LARGEST_E4M3 = 126  # byte 127 is NaN
# Candidates as steps of e4m3 from the scale that just covers the block. Three above, the largest weight lands
# on the second largest value instead. On Gaussian weights these four, in both signs, give a relative error of
# 0.0784 (block 32) and 0.0699 (block 16), against 0.0786 and 0.0708 for (-2, -1, 0, 1, 2), and 0.0779 and
# 0.0685 for -2 to 6.
NF4_STEPS = (0, -1, -2, 3)
N_E8M0 = 255  # powers of two; byte 255 is NaN
MXFP4_STEPS = (0, -1, 1)


@dataclass(frozen=True)
class Book:
    """The 16 values of a codec with tables that find the nearest one in a few element-wise steps.

    The range [-reach, reach) is cut into cells. A cell contains at most one midpoint between neighbouring
    values: `position` is the rank of the nearest value at the left edge, one more to the right of `midpoint`.
    """

    values: Tensor  # [16] by code
    code_of_rank: Tensor  # [ranks] int32
    reach: float
    position: Tensor  # [cells] int32, rank
    midpoint: Tensor  # [cells] float32, inf where the cell has none
    rough: Tensor  # [cells] float32, the value nearest to the cell's centre: good enough to compare scales
    scale_of_byte: Tensor  # [256] float32


@cache
def book(name: str) -> Book:
    """The book of a four-bit codec."""
    return _make_book(FP4_CODES, _e8m0(), 8.0) if name == "mxfp4" else _make_book(NF4_VALUES, _e4m3(), 2.0)


def _make_book(values: tuple[float, ...], scales: Tensor, reach: float) -> Book:
    by_code = torch.tensor(values)
    ranked = torch.unique(by_code)  # sorted; drops the second zero of FP4
    code_of_rank = torch.tensor([values.index(v) for v in ranked.tolist()], dtype=torch.int32)
    middles = (ranked[1:] + ranked[:-1]) / 2
    width = 2 * reach / N_CELLS
    left = torch.arange(N_CELLS) * width - reach
    position = torch.bucketize(left, middles, right=True)
    following = torch.cat([middles, torch.tensor([torch.inf])])[position]
    return Book(
        values=by_code,
        code_of_rank=code_of_rank,
        reach=reach,
        position=position.int(),
        midpoint=torch.where(following < left + width, following, torch.inf),
        rough=ranked[torch.bucketize(left + width / 2, middles)],
        scale_of_byte=scales,
    )


def _e4m3() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _e8m0() -> Tensor:
    powers = [2.0 ** (byte - 127) for byte in range(N_E8M0)]
    return torch.tensor([*powers, torch.nan], dtype=torch.float32)


def tensor_scale(name: str, largest: float) -> float:
    """The float32 factor of a whole matrix, from its largest magnitude; 1 for mxfp4 and for a matrix of
    zeros."""
    if name == "mxfp4" or largest == 0:
        return 1.0
    return max(largest / NF4_TOP, torch.finfo(torch.float32).tiny)


def encode(codec: Codec, weight: Tensor, scale: float) -> tuple[dict[str, Tensor], float]:
    """Pack float32 [rows, cols] -> parts of the layout and the squared error. Rows are padded to whole
    groups."""
    specs = codec.parts((weight.shape[0], weight.shape[1]))
    codes = torch.empty(specs["codes"].shape, dtype=torch.uint8)
    scales = torch.empty(specs["scales"].shape, dtype=torch.uint8)
    step = max(1, CHUNK // (ROW_GROUP * 32 * codes.shape[1]))

    def chunk(group: int) -> float:
        rows = weight[group * ROW_GROUP : (group + step) * ROW_GROUP]
        groups = slice(group, group + step)
        return _encode_chunk(codec, rows, scale, codes[groups], scales[groups])

    squared_error = sum(_in_threads(chunk, range(0, codes.shape[0], step)))
    parts = {"codes": codes, "scales": scales, "scale": torch.tensor([scale], dtype=torch.float32)}
    return parts, squared_error * scale * scale


def _in_threads(work: Callable[[int], float], items: range) -> list[float]:
    """Chunks are independent: one Python thread per torch thread, each running small operations on its
    own."""
    n_threads = min(torch.get_num_threads(), len(items))
    if n_threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, items))


def _encode_chunk(codec: Codec, rows: Tensor, scale: float, codes: Tensor, scales: Tensor) -> float:
    """Pack some row groups into their places; returns the squared error in units of `scale`."""
    blocks = _to_blocks(codec, rows) / scale
    scale_bytes = _search(codec, blocks)
    nearest, squared_error = _nearest(codec, blocks, scale_bytes)
    codes.copy_(_pack(codec, nearest, codes.shape))
    scales.copy_(scale_bytes.view(scales.shape))
    return squared_error


def _to_blocks(codec: Codec, rows: Tensor) -> Tensor:
    """[rows, cols] -> [block, N], one column per block in the order (group, column block, sub-block, row)."""
    n_rows, n_cols = rows.shape
    padded = F.pad(rows, (0, -n_cols % 32, 0, -n_rows % ROW_GROUP))
    split = padded.view(-1, ROW_GROUP, padded.shape[1] // 32, 32 // codec.block, codec.block)
    return split.permute(4, 0, 2, 3, 1).reshape(codec.block, -1).contiguous()


def _search(codec: Codec, blocks: Tensor) -> Tensor:
    """The scale byte of each block with the least squared error. blocks [block, N] -> uint8 [N]."""
    table = book(codec.name)
    largest = blocks.abs().amax(0)
    unit = torch.ones(())
    if codec.name == "mxfp4":
        candidates = list(_mxfp4_candidates(largest))
        unit = table.scale_of_byte.index_select(0, candidates[0])  # or squares leave the range of float32
        blocks = blocks / unit
    else:
        candidates = list(_nf4_candidates(largest))
    best_error = torch.full_like(largest, torch.inf)
    best = torch.zeros(largest.shape, dtype=torch.int32)
    for candidate in candidates:
        scale = table.scale_of_byte.index_select(0, candidate) / unit
        error = _rough_error(table, blocks, scale)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, candidate, best)
    return best.masked_fill_(largest == 0, 0).to(torch.uint8)


def search_space(name: str) -> tuple[Tensor, tuple[int, ...]]:
    """Largest magnitude that scale byte i covers, ascending; and the candidates, in steps from the covering
    byte."""
    scales = book(name).scale_of_byte
    if name == "mxfp4":
        return scales[:N_E8M0] * FP4_VALUES[-1], MXFP4_STEPS
    return scales[: LARGEST_E4M3 + 1], NF4_STEPS


def _nf4_candidates(largest: Tensor) -> Iterator[Tensor]:
    """A few steps around the e4m3 value that covers the block, in both signs."""
    covers, steps = search_space("nf4")
    covering = torch.bucketize(largest, covers, out_int32=True)
    # Among the few subnormal values two steps may be a factor of three; half the covering scale is enough.
    floor = ((covering + 1) // 2).clamp_(min=1)
    for sign in (0, 128):
        for step in steps:
            yield torch.maximum(covering + step, floor).clamp_(max=LARGEST_E4M3) + sign


def _mxfp4_candidates(largest: Tensor) -> Iterator[Tensor]:
    """The smallest power of two that covers the block, which is exact for former mxfp4 values, and its
    neighbours."""
    covers, steps = search_space("mxfp4")
    covering = torch.bucketize(largest, covers, out_int32=True)
    for step in steps:
        yield (covering + step).clamp_(0, N_E8M0 - 1)


def _rough_error(table: Book, blocks: Tensor, scale: Tensor) -> Tensor:
    cells = _cells(table, blocks * scale.reciprocal())
    value = table.rough.index_select(0, cells.view(-1)).view(blocks.shape)
    return _sum_rows(value.mul_(scale).sub_(blocks).square_())


def _cells(table: Book, ratio: Tensor) -> Tensor:
    """The table cell of each weight divided by its scale; overwrites `ratio`."""
    per_unit = N_CELLS / (2 * table.reach)
    return ratio.mul_(per_unit).add_(N_CELLS / 2).clamp_(0, N_CELLS - 1).int()


def _sum_rows(x: Tensor) -> Tensor:
    """[block, N] -> [N] by halving: element-wise additions only, so that the order of summation is fixed.

    Overwrites `x`.
    """
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        x = x[:half].add_(x[half:])
    return x[0]


def _nearest(codec: Codec, blocks: Tensor, scale_bytes: Tensor) -> tuple[Tensor, float]:
    """Nearest codes given the rounded scales. -> (uint8 [block, N], squared error)."""
    table = book(codec.name)
    scale = table.scale_of_byte.index_select(0, scale_bytes.int())
    ratio = blocks / torch.where(scale == 0, 1.0, scale)
    cells = _cells(table, ratio.clone()).view(-1)
    codes = table.position.index_select(0, cells)
    codes += ratio.view(-1) > table.midpoint.index_select(0, cells)
    if codec.name == "mxfp4":  # whose codes are not in the order of their values
        codes = table.code_of_rank.index_select(0, codes)
    value = table.values.index_select(0, codes).view(blocks.shape)
    return codes.to(torch.uint8).view(blocks.shape), sum_of_squares(value.mul_(scale).sub_(blocks))


def _pack(codec: Codec, codes: Tensor, shape: torch.Size) -> Tensor:
    """Codes [block, N] -> bytes [groups, column blocks, 256] in the order the kernels read."""
    groups, blocks, _ = shape
    if codec.block == 32:
        low, high = codes.view(2, 16, groups, blocks, ROW_GROUP)
    else:
        low, high = codes.view(16, groups, blocks, 2, ROW_GROUP).unbind(3)
    both: Tensor = (low | high << 4).view(4, 4, groups, blocks, ROW_GROUP)  # v, j, g, b, r
    return both.permute(2, 3, 0, 4, 1).reshape(shape)


def decode(codec: Codec, parts: dict[str, Tensor]) -> Tensor:
    """Parts of whole row groups -> float32 [groups * 16, padded columns]."""
    table = book(codec.name)
    device = parts["codes"].device
    groups, blocks, _ = parts["codes"].shape
    packed = parts["codes"].view(groups, blocks, 4, ROW_GROUP, 4)  # g, b, v, r, j
    codes = torch.stack([packed & 15, packed >> 4], dim=2).permute(0, 4, 1, 2, 3, 5)  # g, r, b, half, v, j
    values = table.values.to(device).index_select(0, codes.reshape(-1).int())
    scale = table.scale_of_byte.to(device).index_select(0, parts["scales"].reshape(-1).int())
    scale = scale.view(groups, blocks, -1, ROW_GROUP).permute(0, 3, 1, 2).unsqueeze(-1)  # g, r, b, sub, 1
    values = values.view(groups, ROW_GROUP, blocks, 32 // codec.block, codec.block).mul_(scale)
    return values.mul_(parts["scale"]).view(groups * ROW_GROUP, blocks * 32)


def from_mxfp4(codes: Tensor, scale_bytes: Tensor) -> dict[str, Tensor]:
    """Rearrange the codes of a checkpoint without touching a value. codes uint8 [rows, cols], scales [rows,
    cols/32].

    Not a second quantisation: code and scale bytes stay what they are, only their order changes.
    """
    rows, cols = codes.shape
    groups, blocks = -(-rows // ROW_GROUP), cols // 32
    pad = (0, 0, 0, groups * ROW_GROUP - rows)
    split = F.pad(codes, pad).view(groups, ROW_GROUP, blocks, 2, 4, 4)  # g, r, b, half, v, j
    low, high = split.permute(3, 0, 2, 4, 1, 5)  # each g, b, v, r, j
    scales = F.pad(scale_bytes, pad).view(groups, ROW_GROUP, blocks).permute(0, 2, 1)
    return {
        "codes": (low | high << 4).reshape(groups, blocks, 256),
        "scales": scales.contiguous(),
        "scale": torch.ones(1),
    }
