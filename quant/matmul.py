"""y = x W^T for a packed W: the reference, and the one place where a native kernel is plugged in.

`backend()` says what runs. It must not know models, pages or where the weights came from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from quant.qtensor import QTensor

Tensor = torch.Tensor
Kernel = Callable[[Tensor, QTensor], Tensor | None]  # None: not this codec, shape or device


def reference(x: Tensor, q: QTensor) -> Tensor:
    """x [..., cols] -> [..., rows] in x.dtype; unpacks a band of rows at a time, rounded to x.dtype."""
    if q.codec in ("bf16", "f32"):
        return F.linear(x, q.parts["weight"].to(x.dtype))
    out = x.new_empty(*x.shape[:-1], q.shape[0])
    for start, stop in q.bands():
        out[..., start:stop] = F.linear(x, q.rows(start, stop).dequantize(x.dtype))
    return out


def _native_kernel() -> Kernel | None:
    """The native kernels where this build has them."""
    try:
        from quant import kernels
    except ImportError:
        return None
    return kernels.linear if kernels.available() else None


_KERNEL = _native_kernel()


def linear(x: Tensor, q: QTensor) -> Tensor:
    """x [..., cols] times the transposed packed matrix -> [..., rows] in x.dtype."""
    if _KERNEL is not None:
        y = _KERNEL(x, q)
        if y is not None:
            return y
    return reference(x, q)


def backend() -> str:
    """What `linear` runs: the instruction set of the native kernels, or "torch-reference"."""
    if _KERNEL is None:
        return "torch-reference"
    from quant import kernels

    return kernels.isa()
