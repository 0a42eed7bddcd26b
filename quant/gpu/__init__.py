"""The Triton kernels: y = x W^T, routed experts and attention on the GPU, with their arguments checked.

Every tensor is compared with its layout before its address reaches a kernel; wrong sizes raise ValueError. The bytes
are those of the pack: nothing is repacked. The same call on the same device gives the same bits. No function asks the
device for a value, so all can be captured in a CUDA graph once they have run (`prepare`, then one call of each shape).
Triton is imported at first use only. It must not know packs, models or tiers.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from quant.formats.codec import KERNEL_FORMATS
from quant.formats.codec import codec as codec_of

if TYPE_CHECKING:
    from quant.formats.page import PageLayout
    from quant.formats.qtensor import QTensor

Tensor = torch.Tensor

FORMATS = tuple(KERNEL_FORMATS)
INPUTS = (torch.float32, torch.bfloat16)
CACHES = (torch.float32, torch.bfloat16, torch.int8)
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
PARTS = {
    "codes": (torch.uint8, torch.int8),
    "scales": (torch.uint8, torch.float16),
    "scale": (torch.float32,),
}
GEMV_TOKENS = {torch.bfloat16: 2, torch.float32: 8}  # beyond, bfloat16 goes to the tensor cores
# Tokens in bfloat16 from which W is unpacked and the library multiplies, unless `unpack_from` says otherwise.
UNPACK_FROM = 257
VERSION = 1  # of these kernels; a saved measurement belongs to one version
DECODE_TOKENS = 8  # up to here an expert kernel runs one program per token and expert
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 3)  # the first whose functions return tuples of tuples; torch 2.7 brings it
ALIGNMENT = 16  # of an address, for the widest loads
_unpacked_from: dict[tuple[torch.device, str], int] = {}
_checked: WeakSet[QTensor] = WeakSet()  # see `_check_parts`


def available() -> bool:
    """Whether Triton is installed and has something to run on: a CUDA device that knows bfloat16, or, where
    TRITON_INTERPRET asked for it, its interpreter."""
    if not _installed():
        return False
    if torch.cuda.is_available():
        return _capable(torch.cuda.current_device())
    return _interpreted()


def _installed() -> bool:
    return find_spec("triton") is not None and torch.version.hip is None


@lru_cache(maxsize=64)
def _capable(index: int) -> bool:
    """Asked before every product: looked at once."""
    return _installed() and torch.cuda.get_device_capability(index) >= MIN_CAPABILITY


def prepare(device: torch.device | str) -> None:
    """Put the code books on a device, so that a later call can be captured in a CUDA graph."""
    from quant.gpu import launch

    for name in FORMATS:
        launch.book(name, torch.empty(0, device=device).device)


def linear(x: Tensor, q: QTensor) -> Tensor | None:
    """x [..., cols] float32 or bfloat16 -> [..., rows] in x.dtype; None where no kernel serves it.

    One or two tokens (up to 8 in float32): packed words times x, float32 sums. Up to 256, or what
    `unpack_from` says: unpacked tiles on the tensor cores, weights rounded to bfloat16. More: W is unpacked
    band by band and the library multiplies.
    """
    if q.codec not in FORMATS or x.dtype not in INPUTS or x.requires_grad:
        return None
    if x.device != q.device or not _serves(x.device):
        return None
    rows, cols = q.shape
    if x.shape[-1] != cols:
        raise ValueError(f"The input has {x.shape[-1]} columns, the {q.codec} matrix {cols}.")
    _check_parts(q)
    flat = x.reshape(-1, cols)
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], rows)
    with _current(x.device):
        return _kernel_for(flat, q)(flat, q).view(*x.shape[:-1], rows)


def unpack_from(device: torch.device, codec: str, tokens: int) -> None:
    """From so many tokens in bfloat16 on, `linear` unpacks matrices of this codec on this device."""
    _unpacked_from[device, codec] = tokens


def product(x: Tensor, q: QTensor, *, unpacked: bool) -> Tensor:
    """x [n, cols] bfloat16 -> [n, rows] by unpacked tiles on the tensor cores, or W unpacked and the library's matmul:
    for a measurement of which is faster."""
    from quant.gpu import launch

    _check_array("x", x, (torch.bfloat16,), (None, q.shape[1]), q.device)
    _check_device("x", x.device)
    _check_codec(q.codec)
    _check_parts(q)
    with _current(x.device):
        return (launch.unpacked if unpacked else launch.tensor_cores)(x, q)


def dequantize(q: QTensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix [rows, cols] in bfloat16, float16 or float32, for a library's matmul."""
    from quant.gpu import launch

    _check_codec(q.codec)
    _check_device("The matrix", q.device)
    if dtype not in OUTPUTS:
        raise ValueError(f"Weights are unpacked to {', '.join(map(str, OUTPUTS))}, not to {dtype}.")
    _check_parts(q)
    with _current(q.device):
        return launch.dequantize(q, dtype)


def experts(
    x: Tensor, layout: PageLayout, slab: Tensor, slots: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """The routed experts of one layer whose pages are in a slab -> weighted outputs, float32 [n, k, hidden].

    x [n, hidden] float32 or bfloat16. slab uint8 [n_slots, layout.bytes]: a page per slot. slots int32
    [n_experts]: the slot of each expert of the layer, -1 where it has none. chosen int32 or int64 [n,
    k]: experts of each token; weights float32 [n, k]. Output [t, p] is weights[t, p] times expert chosen[t,
    p] of x[t], and zero where the expert has no slot: the CPU's outputs are put there, then
    `combine` adds up in a fixed order.

    Up to 8 tokens: two launches, float32 sums, the inner activation kept in x.dtype. More: tokens sorted by
    expert, everything multiplied in bfloat16; see `workspace_bytes`.
    """
    from quant.gpu import launch

    _check_codec(layout.codec)
    _check_array("x", x, INPUTS, (None, layout.hidden), x.device)
    _check_device("x", x.device)
    n = x.shape[0]
    _check_array("slab", slab, (torch.uint8,), (None, layout.bytes), x.device)
    _check_array("slots", slots, (torch.int32,), (None,), x.device)
    _check_array("chosen", chosen, (torch.int32, torch.int64), (n, None), x.device)
    _check_array("weights", weights, (torch.float32,), tuple(chosen.shape), x.device)
    if 0 in (chosen.numel(), slots.numel(), slab.numel()):
        return torch.zeros(n, chosen.shape[1], layout.hidden, device=x.device)
    run = launch.few_tokens if n <= DECODE_TOKENS else launch.many_tokens
    with _current(x.device):
        return run(x, layout, slab, slots, chosen, weights)


def attends(joined: Tensor, keys: Tensor, head_dims: tuple[int, int]) -> bool:
    """Whether `attend` serves such rows: int8 rows need a scale at a multiple of four bytes."""
    return (
        joined.dtype in INPUTS
        and _serves(joined.device)
        and (keys.dtype != torch.int8 or not any(d % 4 for d in head_dims))
    )


def attend(
    joined: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    positions: Tensor,
    table: Tensor | None = None,
    heads: int,
    head_dims: tuple[int, int],
    first: int,
    window: int | None,
    sink: Tensor | None,
    scale: float,
    value_scale: float,
) -> Tensor:
    """Rotate, append to the cache, attend: joined [n, queries | keys | values] -> [n, heads * d_v] in its type.

    As `quant.kernels.attention.attend`, on the GPU, where positions int64 [n] are too, ascending by one. With joined in
    float32 all is float32; in bfloat16 the tensor cores multiply. With a table int32 [blocks] keys and values are parts
    of a slab, [slots, kv_heads, positions of a slot, d]: position p is in slot table[p // positions of a slot].
    """
    from quant.gpu import attention_launch

    n, (d_k, d_v) = joined.shape[0], head_dims
    kv_heads, rows = keys.shape[-3:-1]
    extra = 4 if keys.dtype == torch.int8 else 0
    half, device = cos.shape[-1], joined.device
    _check_device("joined", device)
    _check_array("joined", joined, INPUTS, (n, heads * d_k + kv_heads * (d_k + d_v)), device)
    _check_array("positions", positions, (torch.int64,), (n,), device)
    for name, turns in (("cos", cos), ("sin", sin)):
        _check_array(name, turns, (torch.float32,), (n, half), device)
    _check_rows("keys", keys, CACHES, (kv_heads, rows, d_k + extra), table)
    _check_rows("values", values, (keys.dtype,), (kv_heads, rows, d_v + extra), table)
    if sink is not None:
        _check_array("sink", sink, (torch.float32,), (heads,), device)
    capacity = rows if table is None else rows * table.numel()
    fits = heads % kv_heads == 0 and 2 * half <= d_k and 0 < n <= capacity and (table is None or first == 0)
    if not fits or not attends(joined, keys, head_dims):
        raise ValueError(
            f"{n} rows (the first row holds position {first}) with {heads} heads of {d_k} and {d_v} do not go "
            f"with keys {list(keys.shape)} in {keys.dtype} and {2 * half} rotated dimensions."
        )
    with _current(device):
        return attention_launch.attend(
            joined, cos, sin, keys, values, positions=positions, table=table, heads=heads, head_dims=head_dims,
            first=first, window=window, sink=sink, scale=scale, value_scale=value_scale,
        )  # fmt: skip


def combine(rows: Tensor) -> Tensor:
    """float32 [n, k, hidden] -> [n, hidden]: rows[:, 0] + rows[:, 1] + ..., always in this order."""
    from quant.gpu import launch

    _check_array("rows", rows, (torch.float32,), (None, None, None), rows.device)
    _check_device("rows", rows.device)
    with _current(rows.device):
        return launch.combine(rows) if rows.numel() else rows.sum(1)


def workspace_bytes(layout: PageLayout, n_tokens: int, k: int, x_bytes: int = 2) -> int:
    """An upper bound of what `experts` allocates, its output included; x_bytes: per element of x.

    The output, the inner activation and, beyond 8 tokens, bfloat16 copies of both inputs in the order of the
    codes.
    """
    hidden, inner = layout.hidden + 64, layout.inner + 64  # with their padding
    pairs = n_tokens * k
    if n_tokens <= DECODE_TOKENS:
        return pairs * (4 * hidden + x_bytes * inner) + n_tokens * x_bytes * hidden
    return pairs * (4 * hidden + 4 * inner + 64) + n_tokens * (x_bytes + 4) * hidden


def _kernel_for(x: Tensor, q: QTensor):  # type: ignore[no-untyped-def]
    from quant.gpu import launch

    n = x.shape[0]
    if n <= GEMV_TOKENS[x.dtype]:
        return launch.gemv
    packed = x.dtype == torch.bfloat16 and n < _unpacked_from.get((x.device, q.codec), UNPACK_FROM)
    return launch.tensor_cores if packed else launch.unpacked


def _interpreted() -> bool:
    if "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ:
        return False  # and triton need not be imported to know it
    from quant.gpu import launch

    return launch.interpreted()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, not on that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _serves(device: torch.device) -> bool:
    """A CUDA device, or the CPU where Triton interprets."""
    if device.type == "cuda":
        return _capable(device.index or 0)
    return device.type == "cpu" and available() and _interpreted()


def _check_device(name: str, device: torch.device) -> None:
    if not _serves(device):
        raise ValueError(f"{name} is on {device}; these kernels need Triton and a CUDA device.")


def _check_codec(name: str) -> None:
    if name not in FORMATS:
        raise ValueError(f"No GPU kernel computes {name}, only {', '.join(FORMATS)}.")


def _check_parts(q: QTensor) -> None:
    """Compare every part with the codec's layout, once: they must not be exchanged afterwards."""
    if q in _checked:
        return
    if min(q.shape) < 1:
        raise ValueError(f"A matrix of {q.shape[0]} x {q.shape[1]} has nothing to multiply.")
    for name, spec in codec_of(q.codec).parts(q.shape).items():
        part = q.parts.get(name)
        if part is None:
            raise ValueError(f"The {q.codec} matrix has no part {name!r}.")
        nbytes = part.numel() * part.element_size()
        fits = part.dtype in PARTS[name] and nbytes == spec.nbytes and part.is_contiguous()
        aligned = name != "codes" or part.data_ptr() % ALIGNMENT == 0
        if not (fits and aligned and part.device == q.device):
            raise ValueError(
                f"Part {name!r} of a {q.shape[0]} x {q.shape[1]} {q.codec} matrix is {part.dtype} with "
                f"{nbytes} bytes on {part.device}; contiguous {PARTS[name][0]} with {spec.nbytes} bytes on "
                f"{q.device}, aligned to {ALIGNMENT} bytes, was expected."
            )
    _checked.add(q)


def _check_rows(
    name: str,
    rows: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    table: Tensor | None,
) -> None:
    """Rows of a cache: one array, or with a table an array in each slot of a slab."""
    if table is None:
        _check_array(name, rows, dtypes, shape, rows.device)
        return
    _check_array("table", table, (torch.int32,), (None,), rows.device)
    if rows.dim() != 4 or rows.shape[0] == 0:
        raise ValueError(
            f"{name} is {list(rows.shape)}; with a table [slots, heads, positions, d] was expected."
        )
    _check_array(f"{name} of a slot", rows[0], dtypes, shape, rows.device)


def _check_array(
    name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...], device: torch.device
) -> None:
    """Compare type, shape (None: any length), device and order with what a kernel reads."""
    same = x.dim() == len(shape) and all(b in (None, a) for a, b in zip(x.shape, shape, strict=True))
    fits = same and x.dtype in dtypes and x.device == device and x.is_contiguous()
    if not fits or x.data_ptr() % x.element_size():
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device}; contiguous {' or '.join(map(str, dtypes))} "
            f"[{wanted}] on {device} was expected."
        )
