"""Packing and checksums in native code: the same bytes as the torch reference and zlib."""

from __future__ import annotations

import zlib

import pytest
import torch

from quant import kernels
from quant.formats import fourbit
from quant.formats.codec import codec
from tests.quant.kernels.isa import ISAS, needs_native

pytestmark = needs_native

Tensor = torch.Tensor
FOUR_BIT = ["nf4", "nf4-16", "mxfp4"]


def native(name: str, weight: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    encoded = kernels.encode(name, weight, scale, fourbit.book(name), *fourbit.search_space(name))
    assert encoded is not None
    return encoded


def hard_matrix(rows: int, cols: int, size: float) -> Tensor:
    """Rows of different spread, zeros, exact book values, outliers and ties."""
    weight = torch.randn(rows, cols) * torch.rand(rows, 1) * size
    weight[0, :3] = 0
    weight[1 % rows] = 0
    weight[2 % rows] *= 1e-6
    weight[3 % rows, 0] = 40 * size
    weight[4 % rows] = torch.tensor(fourbit.NF4_VALUES).repeat(cols // 16 + 1)[:cols] * size
    weight[5 % rows] = torch.randint(-24, 25, (cols,)) / 8 * size  # many lie half-way between two FP4 values
    return weight


@pytest.mark.parametrize("name", FOUR_BIT)
@pytest.mark.parametrize("shape", [(16, 32), (50, 70), (1, 1), (33, 333), (256, 512)])
@pytest.mark.parametrize("size", [1.0, 0.02, 3e-7, 1e5, 1e-30, 1e30])
def test_the_bytes_of_the_torch_reference(name: str, shape: tuple[int, int], size: float) -> None:
    weight = hard_matrix(*shape, size)
    scale = fourbit.tensor_scale(name, float(weight.abs().max()))
    expected, error = fourbit.encode(codec(name), weight, scale)
    for isa in ISAS:
        kernels.force(isa)
        codes, scales, squared = native(name, weight, scale)
        kernels.force(None)
        assert torch.equal(scales, expected["scales"]), isa
        assert torch.equal(codes, expected["codes"]), isa
        assert squared * scale * scale == pytest.approx(error, rel=1e-4, nan_ok=True)


def test_threads_change_nothing() -> None:
    weight = torch.randn(200, 96)
    kernels.set_threads(1)
    one = native("nf4", weight, 0.01)
    kernels.set_threads(3)
    three = native("nf4", weight, 0.01)
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1]) and one[2] == three[2]


def test_what_is_no_matrix_is_refused() -> None:
    for weight in (torch.randn(4), torch.randn(4, 4).double(), torch.randn(0, 4)):
        with pytest.raises(ValueError, match="float32 matrix was expected"):
            native("nf4", weight, 1.0)
    with pytest.raises(ValueError, match="no 4-bit codec"):
        kernels.encode("int8", torch.randn(4, 4), 1.0, fourbit.book("nf4"), torch.ones(1), (0,))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 63, 64, 65, 79, 80, 127, 128, 1000, 4096, 12345])
def test_crc32_is_that_of_zlib(n: int) -> None:
    data = torch.randint(0, 256, (n + 3,), dtype=torch.uint8)[3:]  # not aligned
    for value in (0, 1, 0xFFFFFFFF, 0x12345678):
        expected = zlib.crc32(data.numpy(), value)
        assert kernels.crc32(data, value) == expected
        assert kernels._native.crc32(data.data_ptr(), n, value, True) == expected


def test_crc32_refuses_other_tensors() -> None:
    with pytest.raises(ValueError, match="contiguous uint8"):
        kernels.crc32(torch.randn(4))
