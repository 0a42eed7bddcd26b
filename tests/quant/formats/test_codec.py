"""Codecs: layouts to the byte, errors in float64, values kept exactly, numbers that are hard to scale."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import QTensor, QuantError, quantize
from quant.errors import BadRecipe
from quant.formats.codec import CODECS, codec
from quant.formats.fourbit import FP4_CODES, NF4_VALUES, book, from_mxfp4
from quant.formats.qtensor import DTYPES, row_bands
from quant.ops.quantize import quantize_measured

PACKED = ("nf4", "nf4-16", "mxfp4", "int8", "fp8")
# Relative RMS error on Gaussian weights, with the margin of another seed.
GAUSSIAN = {
    "nf4": 0.079,
    "nf4-16": 0.072,
    "mxfp4": 0.113,
    "int8": 0.0062,
    "fp8": 0.0268,
    "bf16": 0.0018,
    "f32": 0.0,
}
SHAPES = ((1, 1), (16, 32), (17, 33), (3, 200), (130, 129), (256, 64))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_rms(q: QTensor, weight: torch.Tensor) -> float:
    error = q.dequantize().double() - weight.double()
    return float(error.square().sum().sqrt() / weight.double().square().sum().sqrt())


@pytest.mark.parametrize("name", CODECS)
def test_gaussian_error(name: str) -> None:
    weight = gaussian(512, 1024)
    packed, distortion = quantize_measured(weight, name)
    assert relative_rms(packed, weight) <= GAUSSIAN[name]
    assert distortion.rms == pytest.approx(relative_rms(packed, weight), rel=1e-5)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_are_as_priced(name: str, shape: tuple[int, int]) -> None:
    packed = quantize(gaussian(*shape), name)
    specs = codec(name).parts(shape)
    assert list(packed.parts) == list(specs)
    for part, spec in specs.items():
        assert packed.parts[part].shape == spec.shape
        assert packed.parts[part].dtype == DTYPES[spec.dtype]
        assert packed.parts[part].is_contiguous()
    assert packed.nbytes == codec(name).nbytes(shape)


def test_bits_per_weight() -> None:
    bits = {name: codec(name).bits_per_weight((4096, 2048)) for name in CODECS}
    assert {name: round(value, 2) for name, value in bits.items()} == {
        "nf4": 4.25, "nf4-16": 4.5, "mxfp4": 4.25, "int8": 8.25, "fp8": 8.0, "bf16": 16.0, "f32": 32.0,
    }  # fmt: skip


def test_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(BadRecipe, match=r"nf5.*nf4, nf4-16, mxfp4, int8, fp8, bf16, f32"):
        quantize(torch.ones(2, 2), "nf5")


def test_nf4_book_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == torch.tensor(NF4_VALUES).tolist()


@pytest.mark.parametrize("name", ["nf4", "nf4-16", "mxfp4"])
def test_layout_of_four_bit_codes(name: str) -> None:
    """Every byte is found by the formula in codec.py, computed here one weight at a time."""
    rows, cols = 21, 70
    packed = quantize(gaussian(rows, cols), name)
    codes, scales, scale = (packed.parts[part] for part in ("codes", "scales", "scale"))
    table = book(name)
    block = codec(name).block
    values = packed.dequantize()
    for row in range(rows):
        for col in range(cols):
            g, r, b, inside = row // 16, row % 16, col // 32, col % 32
            v, j = inside % 16 // 4, inside % 4
            byte = int(codes[g, b, v * 64 + r * 4 + j])
            code = byte >> 4 if inside >= 16 else byte & 15
            factor = table.scale_of_byte[int(scales[g, b, inside // block * 16 + r])]
            assert values[row, col] == table.values[code] * factor * scale[0]


def test_layout_of_int8() -> None:
    rows, cols = 19, 130
    packed = quantize(gaussian(rows, cols), "int8")
    codes, scales = packed.parts["codes"], packed.parts["scales"]
    values = packed.dequantize()
    for row in range(rows):
        for col in range(cols):
            g, r, b, v, j = row // 16, row % 16, col // 64, col % 64 // 4, col % 4
            assert values[row, col] == codes[g, b, v, r * 4 + j].float() * scales[g, b, r].float()


@pytest.mark.parametrize("name", ["nf4", "nf4-16", "mxfp4"])
def test_codes_are_nearest(name: str) -> None:
    """Given the chosen scale no other code is closer."""
    weight = gaussian(16, 64)
    packed = quantize(weight, name)
    block, scales = codec(name).block, packed.parts["scales"]
    table = book(name)
    values = packed.dequantize()
    for row in range(16):
        for col in range(64):
            byte = int(scales[0, col // 32, col % 32 // block * 16 + row])
            possible = table.values * table.scale_of_byte[byte] * packed.parts["scale"]
            closest = (possible - weight[row, col]).abs().min()
            assert (values[row, col] - weight[row, col]).abs() <= closest * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("name", ["nf4", "nf4-16"])
def test_negative_scales_serve_blocks_that_lean_the_other_way(name: str) -> None:
    """The mirror image of a matrix costs the same: the book has no better side."""
    weight = gaussian(64, 256)
    assert relative_rms(quantize(-weight, name), -weight) == pytest.approx(
        relative_rms(quantize(weight, name), weight), rel=1e-3
    )


def mxfp4_values(
    rows: int, cols: int, seed: int, low: int = 100, high: int = 140
) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, cols), generator=random, dtype=torch.uint8)
    exponents = torch.randint(low, high, (rows, cols // 32), generator=random, dtype=torch.uint8)
    scale = torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)
    return codes, exponents, (torch.tensor(FP4_CODES).double()[codes.long()] * scale).float()


@pytest.mark.parametrize(("low", "high"), [(100, 140), (0, 20), (240, 253)])
def test_mxfp4_values_survive_quantising(low: int, high: int) -> None:
    _, _, values = mxfp4_values(40, 96, seed=1, low=low, high=high)
    assert torch.equal(quantize(values, "mxfp4").dequantize(), values)


def test_mxfp4_bytes_survive_rearranging() -> None:
    codes, exponents, values = mxfp4_values(37, 64, seed=2, low=0, high=255)
    values = values.where(values.isfinite(), torch.zeros(()))
    exponents = exponents.clamp(max=252)
    _, _, values = codes, exponents, torch.tensor(FP4_CODES)[codes.long()]
    values = values * torch.exp2(exponents.double() - 127).float().repeat_interleave(32, 1)
    packed = QTensor("mxfp4", (37, 64), from_mxfp4(codes, exponents))
    assert torch.equal(packed.dequantize(), values)
    group = packed.parts["scales"][:, :, :].permute(0, 2, 1).reshape(-1, 2)[:37]
    assert torch.equal(group, exponents)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-5, 1.0, 1e4])
def test_zero_blocks_and_single_spikes(name: str, magnitude: float) -> None:
    weight = torch.zeros(32, 256)
    weight[3, 70] = magnitude
    weight[20, 5] = -magnitude
    values = quantize(weight, name).dequantize()
    floor = 2**-24 if name == "int8" else 0.0  # the smallest float16 scale
    tolerance = max(magnitude * (0.2 if name == "mxfp4" else 0.04), floor)
    assert (values - weight).abs().max() <= tolerance
    untouched = torch.ones(32, 256, dtype=torch.bool)
    untouched[3, 64:128] = untouched[20, :64] = False
    assert not values[untouched].any()


@pytest.mark.parametrize("name", CODECS)
def test_all_zero(name: str) -> None:
    assert not quantize(torch.zeros(20, 40), name).dequantize().any()


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("factor", [1e-20, 1e-4, 1e4, 1e20])
def test_error_does_not_depend_on_the_unit(name: str, factor: float) -> None:
    if name == "int8" and factor in (1e-20, 1e20):
        pytest.skip("float16 scales span 6e-8 to 65504")
    weight = gaussian(64, 256) * factor
    assert relative_rms(quantize(weight, name), weight) <= GAUSSIAN[name] * 1.06


@pytest.mark.parametrize("name", ["nf4", "nf4-16"])
def test_rows_of_very_different_size(name: str) -> None:
    """One tensor scale and e4m3 block scales together reach over five decades."""
    weight = gaussian(96, 256) * torch.logspace(0, -4, 96)[:, None]
    packed = quantize(weight, name)
    for row in range(96):
        error = (packed.dequantize()[row] - weight[row]).norm() / weight[row].norm()
        assert error < 0.12, f"row {row}"


def test_int8_refuses_what_float16_scales_can_not_reach() -> None:
    with pytest.raises(QuantError, match=r"1e\+08.*8\.3e6"):
        quantize(torch.full((2, 2), 1e8), "int8")


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_what_is_not_finite(name: str, bad: float) -> None:
    weight = torch.ones(20, 40)
    weight[11, 7] = bad
    with pytest.raises(QuantError, match="NaN or infinity"):
        quantize(weight, name)


def test_refuses_what_is_no_matrix() -> None:
    with pytest.raises(QuantError, match="Only matrices"):
        quantize(torch.ones(4), "nf4")
    with pytest.raises(QuantError, match="Only matrices"):
        quantize(torch.ones(0, 4), "nf4")


def test_the_source_is_left_alone() -> None:
    for shape in SHAPES:
        for name in CODECS:
            weight = gaussian(*shape)
            quantize(weight, name)
            assert torch.equal(weight, gaussian(*shape))


@pytest.mark.parametrize("name", CODECS)
def test_bands_laid_end_to_end_are_the_matrix(name: str) -> None:
    weight = gaussian(300, 70)
    whole = quantize(weight, name)
    largest = float(weight.abs().max())
    pieces = [
        quantize_measured(weight[a:b], name, largest=largest)[0]
        for a, b in row_bands((300, 70), codec(name).row_step, limit=70 * 128)
    ]
    assert len(pieces) > 1
    for part, tensor in whole.parts.items():
        joined = pieces[0].parts[part] if part == "scale" else torch.cat([p.parts[part] for p in pieces])
        assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("name", CODECS)
def test_rows_of_a_packed_matrix(name: str) -> None:
    packed = quantize(gaussian(300, 70), name)
    step = codec(name).row_step
    assert torch.equal(packed.rows(step, 2 * step).dequantize(), packed.dequantize()[step : 2 * step])
    assert torch.equal(packed.rows(256, 300).dequantize(), packed.dequantize()[256:])
    if step > 1:
        with pytest.raises(ValueError, match="multiples"):
            packed.rows(1, step)


@pytest.mark.parametrize("name", CODECS)
def test_dequantize_dtype(name: str) -> None:
    packed = quantize(gaussian(33, 65), name)
    assert torch.equal(packed.dequantize(torch.bfloat16), packed.dequantize().bfloat16())


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(PACKED),
    rows=st.integers(1, 70),
    cols=st.integers(1, 140),
    seed=st.integers(0, 1 << 16),
    exponent=st.integers(-12, 6),
)
def test_any_shape_and_scale(name: str, rows: int, cols: int, seed: int, exponent: int) -> None:
    random = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(rows, 1, generator=random))
    weight = torch.randn(rows, cols, generator=random) * spread * 2.0**exponent
    packed, distortion = quantize_measured(weight, name)
    values = packed.dequantize()
    assert values.shape == weight.shape
    assert values.isfinite().all()
    # No weight is off by more than half the widest gap of the book, nor by what clipping may cost.
    bound = {"nf4": 0.45, "nf4-16": 0.45, "mxfp4": 0.34, "int8": 0.005, "fp8": 0.04}[name]
    assert (values - weight).abs().max() <= bound * weight.abs().max() + 1e-7
    assert distortion.rms == pytest.approx(relative_rms(packed, weight), rel=1e-3, abs=1e-6)


THREADS = """
import hashlib, torch
from quant import quantize
from quant.ops.quantize import quantize_measured
torch.set_num_threads({n})
weight = torch.randn(400, 1000, generator=torch.Generator().manual_seed(3))
digest = hashlib.sha256()
for name in ("nf4", "nf4-16", "mxfp4", "int8", "fp8"):
    packed, distortion = quantize_measured(weight, name)
    for part in packed.parts.values():
        digest.update(part.view(torch.uint8).numpy().tobytes())
    digest.update(repr(distortion).encode())
print(digest.hexdigest(), torch.get_num_threads())
"""


def test_threads_do_not_change_a_byte() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", THREADS.format(n=n)], capture_output=True, text=True, check=True
        )
        for n in (1, 3)
    ]
    digests, threads = zip(*(run.stdout.split() for run in runs), strict=True)
    assert len(set(digests)) == 1
    assert threads == ("1", "3")
