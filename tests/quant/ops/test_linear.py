"""y = x W^T: the reference against float64, and that whatever is plugged in stays close to it."""

import os
import subprocess
import sys

import pytest
import torch

import quant
from quant import kernels
from quant.formats.codec import CODECS
from quant.formats.qtensor import row_bands
from quant.ops.linear import backend, linear, reference


def case(codec: str, rows: int, cols: int, *batch: int, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    random = torch.Generator().manual_seed(rows * cols)
    packed = quant.quantize(torch.randn(rows, cols, generator=random), codec)
    x = torch.randn(*batch, cols, generator=random).to(dtype)
    return x, packed, x.double() @ packed.dequantize(torch.float64).T


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float64, 1e-12)]
)
def test_reference(codec: str, dtype: torch.dtype, tolerance: float) -> None:
    x, packed, exact = case(codec, 70, 130, 2, 3, dtype=dtype)
    y = reference(x, packed)
    assert y.dtype == dtype and y.shape == (2, 3, 70)
    assert (y.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_plugged_in_agrees(codec: str, dtype: torch.dtype) -> None:
    x, packed, exact = case(codec, 70, 130, 5, dtype=dtype)
    y = linear(x, packed)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= (8e-3 if dtype == torch.bfloat16 else 1e-3) * exact.norm()


def test_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix bigger than a band is multiplied piece by piece, with the same result."""
    x, packed, exact = case("nf4", 300, 64, 4)
    monkeypatch.setattr(
        "quant.formats.qtensor.row_bands", lambda shape, step, _: row_bands(shape, step, 64 * 128)
    )
    assert packed.bands() == [(0, 128), (128, 256), (256, 300)]
    assert (reference(x, packed).double() - exact).norm() <= 2e-6 * exact.norm()


def test_backend_is_named() -> None:
    assert backend() == "torch-reference" or backend() in kernels.supported()
    assert quant.linear is linear and quant.backend is backend


def test_import_is_light() -> None:
    code = (
        "import sys, quant\n"
        "from quant import checkpoint, conversion, errors, pack\n"
        "from quant.checkpoint import source\n"
        "from quant.conversion import conversion, listing, recipe, writer\n"
        "from quant.pack import pack, verify\n"
        "assert callable(quant.convert) and callable(quant.verify)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert set(quant.__all__) <= set(dir(quant))\n"
        "assert callable(quant.linear) and callable(quant.quantize)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = quant.nonsense
