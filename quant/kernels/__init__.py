"""y = x W^T and whole experts on the CPU, straight from packed bytes: the checked face of the native module.

Every tensor is compared with its codec's layout here, before an address reaches C++; wrong sizes raise
ValueError. All instruction sets, batch sizes and thread counts give the same bits. Where no native module was
built `available()` is False and the torch reference computes. It must not know packs, models or tiers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from quant.codec import codec as codec_of

if TYPE_CHECKING:
    from quant.fourbit import Book
    from quant.page import PageLayout
    from quant.qtensor import QTensor

try:
    from quant.kernels import _native
except ImportError:  # no compiler at install time
    _native = None  # type: ignore[assignment]

Tensor = torch.Tensor
Encoded = tuple[Tensor, Tensor, float]

if _native is not None:
    _native.set_threads(torch.get_num_threads())  # the physical cores, unless the user said otherwise

FORMATS = {"nf4": 0, "nf4-16": 1, "mxfp4": 2, "int8": 3}
INPUTS = (torch.float32, torch.bfloat16)
DTYPES = {
    "codes": (torch.uint8, torch.int8),
    "scales": (torch.uint8, torch.float16),
    "scale": (torch.float32,),
}
N_CELLS = 1024  # of a book's tables
NO_MODULE = "This build has no native kernels. Install a C++17 compiler, then reinstall the package."


def available() -> bool:
    """Whether the native module was built."""
    return _native is not None


def isa() -> str:
    """The instruction set in use, or "torch-reference"."""
    return _native.isa() if _native is not None else "torch-reference"


def supported() -> list[str]:
    """The instruction sets that this build has and this CPU can run, best first."""
    return list(_native.supported()) if _native is not None else []


def force(name: str | None) -> None:
    """Use one instruction set; None goes back to the best. For tests and comparisons."""
    if not _module().force(name or ""):
        raise ValueError(f"This CPU or build has no {name!r} kernels; it has {', '.join(supported())}.")


def set_threads(n: int) -> None:
    """Threads of the kernels' own pool, the calling one included. Changes speed only, never a result."""
    if not 1 <= n <= 1024:
        raise ValueError(f"The kernels run on 1 to 1024 threads, not {n}.")
    _module().set_threads(n)


def threads() -> int:
    """Threads in use, the calling one included."""
    return _native.threads() if _native is not None else 0


def pin(cpus: Sequence[int]) -> bool:
    """Bind the pool's workers to CPUs, in turn; [] leaves them to the system. False: not supported."""
    return bool(_module().pin(list(cpus)))


def linear(x: Tensor, q: QTensor) -> Tensor | None:
    """x [..., cols] float32 or bfloat16 -> [..., rows] in x.dtype; None where no kernel serves it."""
    if _native is None or q.codec not in FORMATS or x.dtype not in INPUTS or x.requires_grad:
        return None
    if x.device.type != "cpu" or q.device.type != "cpu":
        return None
    rows, cols = q.shape
    if x.shape[-1] != cols:
        raise ValueError(f"The input has {x.shape[-1]} columns, the {q.codec} matrix {cols}.")
    codes, scales, scale = _checked_parts(q)
    flat = x.reshape(-1, cols).contiguous()
    y = torch.empty(flat.shape[0], rows, dtype=torch.float32)
    half = x.dtype == torch.bfloat16
    _native.linear(
        FORMATS[q.codec], rows, cols, codes, scales, scale, flat.data_ptr(), half, flat.shape[0], y.data_ptr()
    )
    return (y.bfloat16() if half else y).view(*x.shape[:-1], rows)


def experts(
    x: Tensor,
    layout: PageLayout,
    pages: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weights: Sequence[Tensor],
    out: Tensor,
    rows: Sequence[Tensor] | None = None,
) -> Tensor:
    """Routed experts of one layer: SiLU-gated FFNs straight from their pages.

    x [n, hidden] float32 or bfloat16. Expert e has the page pages[e] (uint8 [>= layout.bytes]), works on the
    tokens tokens[e] (integers into x) and multiplies by weights[e] (one per token). Without `rows` the
    weighted outputs are added to out[token] (float32 [n, hidden]) in the order of `pages`: give experts in
    ascending order and the sum is always the same. With `rows` each output is stored in its own row of `out`
    instead (no row twice), so that parts of a layer computed elsewhere can be summed in a fixed order later.
    An output depends on its token, page and weight alone, to the last bit. Returns `out`.
    """
    module = _module()
    if layout.codec not in FORMATS:
        raise ValueError(f"No native kernel computes {layout.codec} experts, only {', '.join(FORMATS)}.")
    _check_matrix("x", x, INPUTS, layout.hidden)
    _check_matrix("out", out, (torch.float32,), layout.hidden)
    if not len(pages) == len(tokens) == len(weights) == len(rows if rows is not None else pages):
        raise ValueError(
            f"{len(pages)} pages, but {len(tokens)} token lists and {len(weights)} weight lists."
        )
    if rows is None and out.shape[0] != x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows, out has {out.shape[0]}; they must agree to add into out.")
    if not pages:
        return out
    counts = [token.numel() for token in tokens]
    token = _joined("tokens", tokens, counts)
    weight = _joined("weights", weights, counts)
    to = token if rows is None else _joined("rows", rows, counts)
    module.experts(
        FORMATS[layout.codec], layout.hidden, layout.inner, _offsets(layout),
        [_page_address(page, layout.bytes) for page in pages], counts,
        token.data_ptr(), weight.data_ptr(), to.data_ptr(), rows is not None,
        x.data_ptr(), x.dtype == torch.bfloat16, x.shape[0], out.data_ptr(), out.shape[0],
    )  # fmt: skip
    return out


def crc32(data: Tensor, value: int = 0) -> int:
    """zlib.crc32 of a contiguous uint8 tensor, continuing `value`; several times as fast where native."""
    if data.dtype != torch.uint8 or not data.is_contiguous() or data.device.type != "cpu":
        raise ValueError(f"A checksum is taken of contiguous uint8 in main memory, not of {data.dtype}.")
    if _native is None:
        return zlib.crc32(data.numpy(), value)
    return int(_native.crc32(data.data_ptr(), data.numel(), value, False))


def read_all(data: Tensor) -> int:
    """Read whole mebibytes of a contiguous tensor with all threads: its time is the memory's speed."""
    if not data.is_contiguous() or data.device.type != "cpu":
        raise ValueError("Only contiguous tensors in main memory can be read.")
    return int(_module().read_all(data.data_ptr(), data.numel() * data.element_size()))


def encode(
    codec: str, weight: Tensor, scale: float, book: Book, covers: Tensor, steps: Sequence[int]
) -> Encoded | None:
    """Pack float32 [rows, cols] / scale with a 4-bit codec -> (codes, scales, squared error in scale^2).

    Bit for bit the search of `quant/fourbit.py`, whose book this is given; `covers` [n] float32, ascending,
    is the largest magnitude that scale byte i covers; `steps` are the candidates, counted from the one that
    covers the block. Only the error is summed in another order. None where no native module was built.
    """
    if _native is None:
        return None
    if codec not in FORMATS or codec == "int8":
        raise ValueError(f"{codec} is no 4-bit codec.")
    if weight.dtype != torch.float32 or weight.dim() != 2 or weight.device.type != "cpu" or 0 in weight.shape:
        raise ValueError(f"A float32 matrix was expected, not {weight.dtype} {list(weight.shape)}.")
    weight = weight.contiguous()
    rows, cols = weight.shape
    codes_of_ranks = torch.nn.functional.pad(book.code_of_rank, (0, 16 - book.code_of_rank.numel()))
    tables = [
        _table(book.values, torch.float32, 16), _table(codes_of_ranks, torch.int32, 16),
        _table(book.position, torch.int32, N_CELLS), _table(book.midpoint, torch.float32, N_CELLS),
        _table(book.rough, torch.float32, N_CELLS), _table(book.scale_of_byte, torch.float32, 256),
        _table(covers, torch.float32, 1),
    ]  # fmt: skip
    specs = codec_of(codec).parts((rows, cols))
    codes = torch.empty(specs["codes"].shape, dtype=torch.uint8)
    scales = torch.empty(specs["scales"].shape, dtype=torch.uint8)
    _part_bytes(codec, rows, cols)
    per_unit, centre = N_CELLS / (2 * book.reach), N_CELLS / 2
    error = _native.encode(
        FORMATS[codec], [t.data_ptr() for t in tables], covers.numel(), per_unit, centre, list(steps),
        weight.data_ptr(), rows, cols, scale, codes.data_ptr(), scales.data_ptr(),
    )  # fmt: skip
    return codes, scales, float(error)


def _table(table: Tensor, dtype: torch.dtype, at_least: int) -> Tensor:
    if table.dtype != dtype or table.numel() < at_least or not table.is_contiguous():
        raise ValueError(f"A table of the book is {table.dtype} [{table.numel()}], not {dtype} [{at_least}].")
    return table


def _module():  # type: ignore[no-untyped-def]
    if _native is None:
        raise RuntimeError(NO_MODULE)
    return _native


def _checked_parts(q: QTensor) -> tuple[int, int, int]:
    """Addresses of codes, scales and scale (0: none), after comparing them with the codec's layout."""
    rows, cols = q.shape
    if rows < 1 or cols < 1:
        raise ValueError(f"A matrix of {rows} x {cols} has nothing to multiply.")
    found = [0, 0, 0]
    for i, (name, expected) in enumerate(_part_bytes(q.codec, rows, cols)):
        part = q.parts.get(name)
        if part is None:
            raise ValueError(f"The {q.codec} matrix has no part {name!r}.")
        nbytes = part.numel() * part.element_size()
        if part.dtype not in DTYPES[name] or nbytes != expected or not part.is_contiguous():
            raise ValueError(
                f"Part {name!r} of a {rows} x {cols} {q.codec} matrix is {part.dtype} with {nbytes} bytes; "
                f"contiguous {DTYPES[name][0]} with {expected} bytes was expected."
            )
        found[i] = part.data_ptr()
    return found[0], found[1], found[2]


@lru_cache(maxsize=256)
def _part_bytes(codec: str, rows: int, cols: int) -> tuple[tuple[str, int], ...]:
    """Part -> bytes, on whose sizes the codec and the native module agree."""
    sizes = {name: spec.nbytes for name, spec in codec_of(codec).parts((rows, cols)).items()}
    native = tuple(_module().part_bytes(FORMATS[codec], rows, cols))
    assert native == (sizes["codes"], sizes["scales"]), f"{codec} and its kernel disagree: {rows} x {cols}"
    return tuple(sizes.items())


@lru_cache(maxsize=16)
def _offsets(layout: PageLayout) -> list[int]:
    """codes, scales, scale (-1: none) of gate, up and down in a page."""
    at = {(s.matrix, s.part): s.offset for s in layout.slices}
    for matrix in ("gate", "up", "down"):
        _part_bytes(layout.codec, *layout.shape(matrix))
    return [at.get((m, p), -1) for m in ("gate", "up", "down") for p in ("codes", "scales", "scale")]


def _check_matrix(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], cols: int) -> None:
    fits = x.dim() == 2 and x.dtype in dtypes and x.shape[1] == cols
    if not (fits and x.device.type == "cpu" and x.is_contiguous()):
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device}; contiguous {dtypes[0]} [n, {cols}] in main "
            "memory was expected."
        )


def _joined(name: str, lists: Sequence[Tensor], counts: list[int]) -> Tensor:
    """One list per page, end to end: int64 for tokens and rows, float32 for weights."""
    sizes = [part.numel() for part in lists]
    if sizes != counts:
        raise ValueError(f"{name} come in lists of {sizes}, tokens of {counts}.")
    flat = torch.cat(lists)  # type: ignore[arg-type]
    if flat.dim() != 1 or flat.is_floating_point() != (name == "weights"):
        raise ValueError(f"{name} are {flat.dtype} with {flat.dim()} dimensions; flat lists were expected.")
    return flat.to(torch.float32 if name == "weights" else torch.int64)


def _page_address(page: Tensor, n_bytes: int) -> int:
    fits = page.dtype == torch.uint8 and page.numel() >= n_bytes
    if not (fits and page.is_contiguous() and page.device.type == "cpu"):
        raise ValueError(
            f"A page is {page.dtype} with {page.numel()} bytes on {page.device}; contiguous torch.uint8 with "
            f"{n_bytes} bytes in main memory was expected."
        )
    return page.data_ptr()
