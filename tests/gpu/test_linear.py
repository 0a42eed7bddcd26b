"""Packed matrices times x on the GPU against float64, on shapes that no layout likes."""

import pytest
import torch

from quant import gpu
from quant.gpu import FORMATS
from tests.gpu.pages import random_matrix, relative

SHAPES = [(16, 64), (40, 150), (1, 1)]
F32_ERROR = 1e-6  # float32 sums of a hundred products
BF16_ERROR = 3.5e-3  # x exact; products, weights or the result rounded to 8 bits


def check(codec: str, shape: tuple[int, int], n: int, dtype: torch.dtype, device: str) -> None:
    q = random_matrix(codec, *shape, seed=n)
    x = torch.randn(n, shape[1], generator=torch.Generator().manual_seed(n)).to(dtype)
    y = gpu.linear(x.to(device), q.to(device))
    assert y is not None
    assert (y.shape, y.dtype) == ((n, shape[0]), dtype)
    wanted = x.double() @ q.dequantize().double().T
    assert relative(y, wanted) < (F32_ERROR if dtype == torch.float32 else BF16_ERROR)


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (2, torch.bfloat16)])
def test_gemv(codec: str, shape: tuple[int, int], n: int, dtype: torch.dtype, device: str) -> None:
    check(codec, shape, n, dtype, device)


@pytest.mark.parametrize("n", range(3, 9))
def test_every_small_number_of_tokens(n: int, device: str) -> None:
    check(FORMATS[n % 4], (24, 70), n, torch.float32, device)
    check(FORMATS[n % 4], (24, 70), n, torch.bfloat16, device)


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("n", [17, 70, 130])
def test_tiles_on_tensor_cores(codec: str, n: int, device: str) -> None:
    check(codec, (72, 200), n, torch.bfloat16, device)


@pytest.mark.parametrize(("n", "dtype"), [(9, torch.float32), (257, torch.bfloat16)])
def test_unpacked_and_left_to_the_library(n: int, dtype: torch.dtype, device: str) -> None:
    check("nf4", (40, 96), n, dtype, device)


@pytest.mark.parametrize("codec", ["nf4-16", "int8"])
@pytest.mark.parametrize("n", [1, 5])
def test_split_columns_are_added(codec: str, n: int, device: str) -> None:
    from quant.gpu import launch

    cols = 300 * 8 if codec != "int8" else 300 * 4
    assert launch.split_columns(2, launch.words_per_row(codec, cols), 64)[0] > 1
    check(codec, (24, cols), n, torch.bfloat16, device)


def test_leading_dimensions_and_no_tokens(device: str) -> None:
    q = random_matrix("nf4", 20, 40, seed=0).to(device)
    x = torch.randn(2, 1, 40).to(device)
    y = gpu.linear(x, q)
    assert y is not None and y.shape == (2, 1, 20)
    assert torch.equal(y[1], gpu.linear(x[1], q))
    assert gpu.linear(x[:0], q).shape == (0, 1, 20)


@pytest.mark.parametrize("n", [1, 4])
def test_inputs_that_start_anywhere(n: int, device: str) -> None:
    q, buffer = random_matrix("nf4", 16, 64, seed=0).to(device), torch.randn(n * 64 + 1).bfloat16().to(device)
    shifted, transposed = buffer[1:].view(n, 64), buffer[:-1].view(64, n).T
    for x in (shifted, transposed):
        assert torch.equal(gpu.linear(x, q), gpu.linear(x.clone().contiguous(), q))


@pytest.mark.parametrize("n", [2, 20])
def test_repetition_gives_the_same_bits(n: int, device: str) -> None:
    q, x = random_matrix("nf4", 40, 150, seed=0).to(device), torch.randn(n, 150).bfloat16().to(device)
    assert torch.equal(gpu.linear(x, q), gpu.linear(x, q))


def test_a_token_is_the_same_alone_and_beside_another(device: str) -> None:
    q, x = random_matrix("mxfp4", 40, 150, seed=0).to(device), torch.randn(2, 150).to(device)
    both, alone = gpu.linear(x, q), torch.cat([gpu.linear(x[:1], q), gpu.linear(x[1:], q)])
    assert torch.equal(both, alone)


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_to_the_last_bit(codec: str, shape: tuple[int, int], device: str) -> None:
    q = random_matrix(codec, *shape, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(gpu.dequantize(q.to(device), dtype).cpu(), q.dequantize().to(dtype))


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's: the largest mxfp4 scales times 6 are infinite
@pytest.mark.parametrize("codec", ["nf4", "mxfp4"])
def test_every_scale_byte_and_code(codec: str, device: str) -> None:
    """All 256 scale bytes, each with all 16 codes; NaN where mxfp4 says so, and left out where nf4 does."""
    q = random_matrix(codec, 256, 32, seed=0)
    scales = torch.arange(256, dtype=torch.uint8).view(16, 1, 16)
    q.parts["scales"].copy_(scales if codec == "mxfp4" else scales.where(scales % 128 != 127, 0))
    q.parts["codes"].copy_(torch.arange(256, dtype=torch.uint8).expand(16, 1, 256))
    found, wanted = gpu.dequantize(q.to(device), torch.float32).cpu(), q.dequantize()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
