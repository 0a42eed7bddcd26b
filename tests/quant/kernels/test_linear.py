"""y = x W^T from packed bytes, each instruction set in turn, against float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from quant import kernels
from quant.formats.qtensor import QTensor
from quant.kernels import FORMATS
from quant.ops.quantize import quantize
from tests.quant.kernels.isa import ISAS, needs_native, relative

pytestmark = needs_native

SHAPES = [(16, 64), (50, 70), (17, 33), (1, 1), (80, 300), (33, 1027)]
TOKENS = [1, 2, 3, 5, 8, 9, 16, 17, 29, 300]


def packed(format: str, rows: int, cols: int) -> QTensor:
    """A fresh copy: some tests write into the parts."""
    made = _packed(format, rows, cols)
    return QTensor(format, made.shape, {name: part.clone() for name, part in made.parts.items()})


@cache
def _packed(format: str, rows: int, cols: int) -> QTensor:
    generator = torch.Generator().manual_seed(rows * 10_000 + cols)
    return quantize(torch.randn(rows, cols, generator=generator), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_agrees_with_float64(format: str, shape: tuple[int, int]) -> None:
    q = packed(format, *shape)
    weight = q.dequantize().double()
    for n in TOKENS if shape != (33, 1027) else [1, 40]:
        x = torch.randn(n, shape[1]) * torch.rand(n, 1) * 10
        exact = x.double() @ weight.T
        outputs = {name: run(name, x, q) for name in ISAS}
        for name, y in outputs.items():
            assert relative(y, exact) < 4e-4, (name, n)
            assert torch.equal(y, outputs["portable"]), (name, n)


def run(name: str, x: torch.Tensor, q: QTensor) -> torch.Tensor:
    kernels.force(name)
    try:
        y = kernels.linear(x, q)
    finally:
        kernels.force(None)
    assert y is not None
    return y


@pytest.mark.parametrize("format", FORMATS)
def test_error_is_far_below_that_of_bf16(format: str) -> None:
    q = packed(format, 256, 512)
    x = torch.randn(8, 512)
    exact = x.double() @ q.dequantize().double().T
    ours = kernels.linear(x, q)
    theirs = torch.nn.functional.linear(x.bfloat16(), q.dequantize(torch.bfloat16))
    assert ours is not None
    assert relative(ours, exact) < 0.2 * relative(theirs, exact)


@pytest.mark.parametrize("format", FORMATS)
def test_batch_and_threads_change_no_bit(format: str) -> None:
    q = packed(format, 100, 333)
    x = torch.randn(61, 333)
    kernels.set_threads(1)
    alone = torch.cat([kernels.linear(row.unsqueeze(0), q) for row in x])
    assert torch.equal(alone, kernels.linear(x, q))
    for n in (2, 3):
        kernels.set_threads(n)
        assert torch.equal(alone, kernels.linear(x, q))


def test_bfloat16_input_gives_the_float32_result_rounded() -> None:
    q = packed("nf4", 48, 1500)
    x = torch.randn(3, 1500).bfloat16()
    y = kernels.linear(x, q)
    assert y is not None and y.dtype == torch.bfloat16
    assert torch.equal(y, kernels.linear(x.float(), q).bfloat16())


def test_leading_dimensions_and_strides() -> None:
    q = packed("int8", 40, 96)
    x = torch.randn(2, 96, 5).transpose(1, 2)
    y = kernels.linear(x, q)
    assert y is not None and y.shape == (2, 5, 40)
    assert torch.equal(y[1, 3], kernels.linear(x[1, 3], q))


def test_outliers_zeros_and_nan() -> None:
    q = packed("nf4", 32, 128)
    weight = q.dequantize().double()
    x = torch.randn(4, 128)
    x[0] = 0
    x[1, 5] = 3e4
    x[2] *= 1e-12
    x[3, 100] = torch.nan
    for name in ISAS:
        y = run(name, x, q)
        assert torch.equal(y[0], torch.zeros(32))
        assert relative(y[1:3], x[1:3].double() @ weight.T) < 4e-4
        assert bool(y[3].isnan().all())


def test_extreme_codes_do_not_overflow() -> None:
    """All codes at the book's end against activations at full scale: the largest sum there can be."""
    for format in FORMATS:
        q = packed(format, 16, 64)
        q.parts["codes"].fill_(-128 if format == "int8" else 0x77 if format == "mxfp4" else 0)
        x = torch.full((1, 64), 5.0)
        exact = x.double() @ q.dequantize().double().T
        for name in ISAS:
            assert relative(run(name, x, q), exact) < 1e-4, (format, name)


@pytest.mark.parametrize("format", ["nf4", "nf4-16"])
def test_every_scale_byte(format: str) -> None:
    q = packed(format, 256, 32)
    for part in range(q.parts["scales"].shape[2] // 16):
        every = torch.arange(256, dtype=torch.uint8).view(16, 1, 16)
        q.parts["scales"][:, :, part * 16 : part * 16 + 16] = torch.where(every & 127 == 127, 0, every)
    x = torch.randn(2, 32)
    exact = x.double() @ q.dequantize().double().T
    for name in ISAS:
        assert relative(run(name, x, q), exact) < 4e-4


def test_every_mxfp4_scale_byte() -> None:
    q = packed("mxfp4", 256, 32)
    q.parts["scales"][:] = torch.arange(256).clamp(max=247).to(torch.uint8).view(16, 1, 16)
    x = torch.randn(1, 32)
    weight = q.dequantize().double()
    exact, size = x.double() @ weight.T, x.abs().double() @ weight.abs().T
    for name in ISAS:
        assert bool(((run(name, x, q) - exact).abs() <= 1e-4 * size + 1e-43).all())


def test_wrong_parts_are_refused() -> None:
    q = packed("nf4", 64, 64)
    x = torch.randn(1, 64)

    def broken(**parts: torch.Tensor) -> QTensor:
        return QTensor("nf4", (64, 64), {**q.parts, **parts})

    codes = q.parts["codes"]
    bad = [
        broken(codes=codes[:-1]),
        broken(codes=codes.transpose(0, 1)),
        broken(codes=codes.float()),
        broken(scales=q.parts["scales"][:, :1]),
        broken(scale=torch.ones(2)),
        broken(scale=torch.ones(1, dtype=torch.float64)),
        QTensor("nf4", (80, 64), q.parts),
        QTensor("nf4", (64, 0), q.parts),
        QTensor("nf4-16", (64, 64), q.parts),
        QTensor("int8", (64, 64), q.parts),
        QTensor("nf4", (64, 64), {"codes": codes}),
    ]
    for tensor in bad:
        with pytest.raises(ValueError, match=r"was expected|no part|nothing to multiply"):
            kernels.linear(x.new_zeros(1, tensor.shape[1]), tensor)
    with pytest.raises(ValueError, match="63 columns"):
        kernels.linear(x[:, :63], q)


def test_what_no_kernel_serves_is_left_to_the_reference() -> None:
    q = packed("nf4", 16, 32)
    assert kernels.linear(torch.randn(1, 32).double(), q) is None
    assert kernels.linear(torch.randn(1, 32), quantize(torch.randn(16, 32), "bf16")) is None
    assert kernels.linear(torch.randn(1, 32, requires_grad=True), q) is None


def test_no_rows() -> None:
    y = kernels.linear(torch.randn(0, 32), packed("nf4", 16, 32))
    assert y is not None and y.shape == (0, 16)
