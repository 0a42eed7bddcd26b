"""What the kernel tests share: the instruction sets to force in turn, and the measure of an error."""

from __future__ import annotations

import pytest
import torch

from quant import kernels

ISAS = kernels.supported()
needs_native = pytest.mark.skipif(not kernels.available(), reason="no native kernels were built")


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error relative to the exact result."""
    return float((y.double() - exact).norm() / exact.norm().clamp_min(1e-300))
