"""The native CPU kernels: y = x W^T and whole experts, straight from packed bytes, with their arguments checked.

Every tensor is compared with its codec's layout before its address reaches C++; wrong sizes raise ValueError. All
instruction sets, batch sizes and thread counts give the same bits. Where no native module was built `available()` is
False and the torch reference computes. It must not know packs, models or tiers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from quant.formats.codec import KERNEL_FORMATS
from quant.formats.codec import codec as codec_of

if TYPE_CHECKING:
    from quant.formats.fourbit import Book
    from quant.formats.page import PageLayout
    from quant.formats.qtensor import QTensor

try:
    from quant.kernels import _native
except ImportError:  # no compiler at install time
    _native = None  # type: ignore[assignment]

Tensor = torch.Tensor
Encoded = tuple[Tensor, Tensor, float]

if _native is not None:
    _native.set_threads(torch.get_num_threads())  # the physical cores, unless the user said otherwise

FORMATS = KERNEL_FORMATS
INPUTS = (torch.float32, torch.bfloat16)
DTYPES = {
    "codes": (torch.uint8, torch.int8),
    "scales": (torch.uint8, torch.float16),
    "scale": (torch.float32,),
}
N_CELLS = 1024  # of a book's tables
_ready: WeakKeyDictionary[QTensor, tuple[Any, list[Tensor]]] = WeakKeyDictionary()  # see `_prepared`
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


@contextmanager
def alone() -> Iterator[None]:
    """Torch computes on the calling thread meanwhile: beside the pool's threads its own would wait for a core.

    Where two others wanted the processor too, 32,768 exponentials took 24 ms instead of 0.04.
    """
    before = torch.get_num_threads()
    if _native is not None:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pin(cpus: Sequence[int]) -> bool:
    """Bind the pool's workers to CPUs, in turn; [] leaves them to the system. False: not supported."""
    return bool(_module().pin(list(cpus)))


def linear(x: Tensor, q: QTensor) -> Tensor | None:
    """x [..., cols] float32 or bfloat16 -> [..., rows] in x.dtype; None where no kernel serves it.

    The parts of `q` are checked at its first use; they must not be exchanged afterwards.
    """
    half = x.dtype is torch.bfloat16
    if not (half or x.dtype is torch.float32) or not x.is_cpu or x.requires_grad:
        return None
    ready = _ready.get(q) or _prepared(q)
    if ready is None:
        return None
    *lead, found = x.shape
    rows, cols = q.shape
    if found != cols:
        raise ValueError(f"The input has {found} columns, the {q.codec} matrix {cols}.")
    if not x.is_contiguous():
        x = x.contiguous()
    y = torch.empty((*lead, rows), dtype=x.dtype)
    ready[0](x.data_ptr(), half, x.numel() // cols, y.data_ptr())
    return y


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
    kernel = _experts_kernel(layout)
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
    kernel.run(
        _page_addresses(pages, layout.bytes), counts, token.data_ptr(), weight.data_ptr(), to.data_ptr(),
        rows is not None, x.data_ptr(), x.dtype is torch.bfloat16, x.shape[0], out.data_ptr(), out.shape[0],
    )  # fmt: skip
    return out


def routed(
    x: Tensor,
    layout: PageLayout,
    pages: Sequence[Tensor],
    places: Tensor,
    spans: Sequence[int],
    weights: Tensor,
    out: Tensor,
) -> None:
    """`experts` as a router leaves them, with no tensor made per expert.

    weights float32 [n, k]: token t gave its choice number i the weight [t, i]; that is place t * k + i, and the
    output goes to the row of that number in out (float32 [n * k, hidden]). Page e runs the places
    places[spans[2 e]:spans[2 e + 1]] (int64).
    """
    kernel = _experts_kernel(layout)
    _check_matrix("x", x, INPUTS, layout.hidden)
    _check_matrix("out", out, (torch.float32,), layout.hidden)
    n, k = weights.shape
    _check_matrix("weights", weights, (torch.float32,), k)
    if n != x.shape[0] or n * k != out.shape[0] or places.dtype is not torch.int64 or places.dim() != 1:
        raise ValueError(
            f"x has {x.shape[0]} rows, weights are {n} x {k}, out has {out.shape[0]} rows and places are "
            f"{places.dtype} {list(places.shape)}; n, n x k, n * k and a flat torch.int64 list were expected."
        )
    kernel.run_places(
        _page_addresses(pages, layout.bytes), spans, places.contiguous().data_ptr(), places.numel(), k,
        weights.data_ptr(), x.data_ptr(), x.dtype is torch.bfloat16, n, out.data_ptr(),
    )  # fmt: skip


def add_in_order(terms: Tensor) -> Tensor:
    """terms float32 [n, k, width] added over k, first to last -> [n, width]."""
    n, k, width = terms.shape
    if terms.dtype is not torch.float32 or not terms.is_contiguous() or not terms.is_cpu or not k:
        raise ValueError(
            f"terms are {terms.dtype} {list(terms.shape)} on {terms.device}; contiguous torch.float32 [n, k, width] "
            "in main memory, with a k of 1 at least, was expected."
        )
    out = torch.empty(n, width)
    _module().add_in_order(terms.data_ptr(), n, k, width, out.data_ptr())
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

    Bit for bit the search of `quant/formats/fourbit.py`, whose book this is given; `covers` [n] float32, ascending,
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


def _module() -> Any:
    if _native is None:
        raise RuntimeError(NO_MODULE)
    return _native


def _prepared(q: QTensor) -> tuple[Any, list[Tensor]] | None:
    """The bound product of a matrix whose parts have been checked, and the parts, to keep them where they are."""
    if _native is None or q.codec not in FORMATS or q.device.type != "cpu":
        return None
    rows, cols = q.shape
    parts = _checked_parts(q)
    addresses = [part.data_ptr() for part in parts] + [0] * (3 - len(parts))
    _ready[q] = ready = (_native.Matrix(FORMATS[q.codec], rows, cols, *addresses).multiply, parts)
    return ready


def _checked_parts(q: QTensor) -> list[Tensor]:
    """codes, scales and, where there is one, scale, after comparing them with the codec's layout."""
    rows, cols = q.shape
    if rows < 1 or cols < 1:
        raise ValueError(f"A matrix of {rows} x {cols} has nothing to multiply.")
    found = []
    for name, expected in _part_bytes(q.codec, rows, cols):
        part = q.parts.get(name)
        if part is None:
            raise ValueError(f"The {q.codec} matrix has no part {name!r}.")
        nbytes = part.numel() * part.element_size()
        if part.dtype not in DTYPES[name] or nbytes != expected or not part.is_contiguous():
            raise ValueError(
                f"Part {name!r} of a {rows} x {cols} {q.codec} matrix is {part.dtype} with {nbytes} bytes; "
                f"contiguous {DTYPES[name][0]} with {expected} bytes was expected."
            )
        found.append(part)
    return found


@lru_cache(maxsize=256)
def _part_bytes(codec: str, rows: int, cols: int) -> tuple[tuple[str, int], ...]:
    """Part -> bytes, on whose sizes the codec and the native module agree."""
    sizes = {name: spec.nbytes for name, spec in codec_of(codec).parts((rows, cols)).items()}
    native = tuple(_module().part_bytes(FORMATS[codec], rows, cols))
    assert native == (sizes["codes"], sizes["scales"]), f"{codec} and its kernel disagree: {rows} x {cols}"
    return tuple(sizes.items())


@lru_cache(maxsize=16)
def _experts_kernel(layout: PageLayout) -> Any:
    """The native side of a layout: codes, scales and scale (-1: none) of gate, up and down in a page."""
    module = _module()
    if layout.codec not in FORMATS:
        raise ValueError(f"No native kernel computes {layout.codec} experts, only {', '.join(FORMATS)}.")
    at = {(s.matrix, s.part): s.offset for s in layout.slices}
    for matrix in ("gate", "up", "down"):
        _part_bytes(layout.codec, *layout.shape(matrix))
    offsets = [at.get((m, p), -1) for m in ("gate", "up", "down") for p in ("codes", "scales", "scale")]
    return module.Experts(FORMATS[layout.codec], layout.hidden, layout.inner, offsets)


def _check_matrix(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], cols: int) -> None:
    fits = x.dim() == 2 and x.dtype in dtypes and x.shape[1] == cols
    if not (fits and x.is_cpu and x.is_contiguous()):
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


def _page_addresses(pages: Sequence[Tensor], n_bytes: int) -> list[int]:
    return [
        page.data_ptr()
        if page.dtype is torch.uint8 and page.numel() >= n_bytes and page.is_cpu and page.is_contiguous()
        else _no_page(page, n_bytes)
        for page in pages
    ]


def _no_page(page: Tensor, n_bytes: int) -> int:
    raise ValueError(
        f"A page is {page.dtype} with {page.numel()} bytes on {page.device}; contiguous torch.uint8 with "
        f"{n_bytes} bytes in main memory was expected."
    )
