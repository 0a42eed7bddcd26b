"""Rounding to bfloat16: every instruction set, and every caller, gives torch's numbers; NaN stays a quiet NaN."""

from __future__ import annotations

import pytest
import torch

from quant import kernels
from quant.formats.qtensor import QTensor
from quant.kernels import attention
from quant.ops.quantize import quantize
from tests.quant.kernels.isa import ISAS, needs_native

pytestmark = needs_native

NAN_PAYLOADS = [1, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x3F0000, 0x3FFFFF, 0x400000, 0x7F8000, 0x7FFFFF]


def special_values() -> torch.Tensor:
    """Float32 of both signs: NaN, infinity, numbers without a leading one, halves exactly between and beside them."""
    uppers = [0, 1, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x4049, 0x7F7E, 0x7F7F]
    lowers = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    numbers = [upper << 16 | lower for upper in uppers for lower in lowers]
    positive = torch.tensor([*numbers, 0x7F800000, *(0x7F800000 | payload for payload in NAN_PAYLOADS)])
    bits = torch.cat([positive, positive | 1 << 31])
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def random_values(n: int) -> torch.Tensor:
    bits = torch.randint(-(1 << 31), 1 << 31, (n,), generator=torch.Generator().manual_seed(1))
    return bits.to(torch.int32).view(torch.float32)


def check(found: torch.Tensor, x: torch.Tensor) -> None:
    """`found`: x rounded to bfloat16."""
    nan = x.isnan()
    bits, expected = found.view(torch.int16), x.to(torch.bfloat16).view(torch.int16)
    assert torch.equal(bits[~nan], expected[~nan])
    upper = (x.view(torch.int32) >> 16).to(torch.int16)
    assert torch.equal(bits[nan], upper[nan] | 0x40)  # quiet, with its sign and the payload's upper bits
    assert torch.equal(found.isnan(), nan)


@pytest.fixture(autouse=True)
def best_afterwards():  # type: ignore[no-untyped-def]
    yield
    kernels.force(None)


def written_to_cache(x: torch.Tensor) -> torch.Tensor:
    """The keys that attention leaves in a bfloat16 cache for x, which is neither rotated nor scaled."""
    d = x.numel()
    keys, values = (torch.zeros(1, 1, d, dtype=torch.bfloat16) for _ in range(2))
    no_rotation = torch.empty(1, 0)
    attention.attend(
        torch.cat([torch.zeros(d), x, x])[None], no_rotation, no_rotation, keys, values, heads=1,
        head_dims=(d, d), position=0, first=0, window=None, sink=None, scale=1.0, value_scale=1.0,
    )  # fmt: skip
    assert torch.equal(keys.view(torch.int16)[~x.isnan().view(1, 1, d)],
                       values.view(torch.int16)[~x.isnan().view(1, 1, d)])  # fmt: skip
    return keys.view(d)


@pytest.mark.parametrize("isa", ISAS)
def test_cache_rows(isa: str) -> None:
    kernels.force(isa)
    special = special_values()
    for x in (special, random_values(1000), *(special.roll(n)[:n] for n in range(1, 40))):
        check(written_to_cache(x), x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 16, 33, 50])
def test_outputs_of_a_product(rows: int, isa: str) -> None:
    """The product of bfloat16 inputs is the float32 product, rounded."""
    kernels.force(isa)
    q = quantize(torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)), "int8")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    x[1, 3] = torch.nan
    exact, rounded = product(x.float(), q), product(x, q)
    assert exact[1].isnan().all() and not exact[0].isnan().any()
    check(rounded.reshape(-1), exact.reshape(-1))


@pytest.mark.parametrize("isa", ISAS)
def test_nan_in_a_query_reaches_its_output(isa: str) -> None:
    kernels.force(isa)
    generator = torch.Generator().manual_seed(3)
    for bits in (0x7F800001, 0x7FFFFFFF, -1):
        joined = torch.randn(2, 3 * 32, generator=generator)
        joined[1, 5] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
        keys, values = (torch.zeros(1, 2, 32, dtype=torch.bfloat16) for _ in range(2))
        out = attention.attend(
            joined, torch.empty(2, 0), torch.empty(2, 0), keys, values, heads=1, head_dims=(32, 32),
            position=0, first=0, window=None, sink=None, scale=1.0, value_scale=1.0,
        )  # fmt: skip
        assert not out[0].isnan().any() and out[1].isnan().all()


def product(x: torch.Tensor, q: QTensor) -> torch.Tensor:
    y = kernels.linear(x, q)
    assert y is not None
    return y
