"""y = x W^T for a packed W: the reference, and the choice between the kernels of CPU and GPU.

`backend()` says what runs on the CPU. It must not know models, pages or where the weights came from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quant import gpu, kernels
from quant.formats.qtensor import QTensor

Tensor = torch.Tensor


def reference(x: Tensor, q: QTensor) -> Tensor:
    """x [..., cols] -> [..., rows] in x.dtype; unpacks a band of rows at a time, rounded to x.dtype."""
    if q.codec in ("bf16", "f32"):
        return F.linear(x, q.parts["weight"].to(x.dtype))
    out = x.new_empty(*x.shape[:-1], q.shape[0])
    for start, stop in q.bands():
        out[..., start:stop] = F.linear(x, q.rows(start, stop).dequantize(x.dtype))
    return out


def linear(x: Tensor, q: QTensor) -> Tensor:
    """x [..., cols] times the transposed packed matrix -> [..., rows] in x.dtype."""
    y = gpu.linear(x, q) if x.is_cuda else kernels.linear(x, q)
    return reference(x, q) if y is None else y


def backend() -> str:
    """What `linear` runs: the instruction set of the native kernels, or "torch-reference"."""
    return kernels.isa()
