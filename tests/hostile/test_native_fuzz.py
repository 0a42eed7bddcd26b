"""Random shapes, bytes and arguments for the native code: a refusal or a result of the right shape, never a crash.

`.ci/sanitize` runs this with address and undefined-behaviour sanitizers, where a read beside a buffer ends the run.
"""

from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import kernels
from quant.formats import fourbit
from quant.formats.codec import ROW_SCALE_BYTES
from quant.formats.codec import codec as codec_of
from quant.formats.page import PageLayout
from quant.formats.qtensor import DTYPES, QTensor
from quant.kernels import FORMATS, attention
from tests.quant.kernels.isa import ISAS, needs_native

pytestmark = needs_native
Tensor = torch.Tensor

SEEDS = st.integers(0, 1 << 40)
HARD = (0.0, -0.0, 1e-45, -1e-38, 65504.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan"))


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    kernels.force(request.param)
    yield
    kernels.force(None)


def fuzz(body: Callable[[Random], None]) -> Callable[[int], None]:
    """`body` with many seeds; torch's own generator follows the seed."""

    def run(seed: int) -> None:
        torch.manual_seed(seed)
        body(Random(seed))

    run.__name__, run.__doc__ = body.__name__, body.__doc__
    return settings(max_examples=100, deadline=None, database=None)(given(seed=SEEDS)(run))


def raw(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    """Any bits."""
    n_bytes = dtype.itemsize * torch.Size(shape).numel()
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8).view(dtype).view(shape)


def floats(rng: Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ordinary numbers, among them the hard ones or any bits."""
    match rng.randrange(3):
        case 0:
            return torch.randn(shape, dtype=dtype)
        case 1:
            return raw(shape, dtype)
        case _:
            hard = torch.tensor(HARD, dtype=dtype)[torch.randint(0, len(HARD), shape)]
            return torch.where(torch.rand(shape) < 0.1, hard, torch.randn(shape, dtype=dtype))


def matrix(rng: Random, rows: int, cols: int) -> QTensor:
    """A packed matrix of any bytes."""
    name = rng.choice([*FORMATS])
    parts = {
        part: raw(spec.shape, DTYPES[spec.dtype]) for part, spec in codec_of(name).parts((rows, cols)).items()
    }
    return QTensor(name, (rows, cols), parts)


def dtype(rng: Random) -> torch.dtype:
    return rng.choice([torch.float32, torch.bfloat16])


@fuzz
def test_matrices(rng: Random) -> None:
    rows, cols, n = rng.randrange(1, 150), rng.randrange(1, 150), rng.randrange(0, 40)
    y = kernels.linear(floats(rng, n, cols, dtype=dtype(rng)), matrix(rng, rows, cols))
    assert y is not None and y.shape == (n, rows)


@fuzz
def test_experts(rng: Random) -> None:
    """Pages of any bytes, tokens and rows that may not exist."""
    layout = PageLayout(rng.choice([*FORMATS]), rng.randrange(1, 100), rng.randrange(1, 100))
    n, n_experts = rng.randrange(1, 30), rng.randrange(0, 5)
    beyond = rng.random() < 0.2
    x, out = floats(rng, n, layout.hidden, dtype=dtype(rng)), torch.zeros(n, layout.hidden)
    counts = [rng.randrange(0, n + 1) for _ in range(n_experts)]
    tokens = [torch.randint(-beyond, n + beyond, (count,)) for count in counts]
    weights = [floats(rng, count) for count in counts]
    pages = [raw((layout.bytes + rng.randrange(-1, 2) * rng.randrange(2),)) for _ in range(n_experts)]
    try:
        kernels.experts(x, layout, pages, tokens, weights, out, rng.choice([None, tokens]))
    except ValueError as error:
        assert str(error)


@fuzz
def test_places(rng: Random) -> None:
    layout = PageLayout(rng.choice([*FORMATS]), rng.randrange(1, 60), rng.randrange(1, 60))
    n, k, n_pages = rng.randrange(1, 20), rng.randrange(1, 9), rng.randrange(0, 4)
    beyond = rng.random() < 0.2
    places = torch.randperm(n * k)
    if beyond:
        places[rng.randrange(n * k)] = rng.choice([-1, n * k, 1 << 62, -(1 << 63)])
    edges = sorted(rng.randrange(0, n * k + 1 + beyond) for _ in range(2 * n_pages))
    rng.random() < 0.1 and rng.shuffle(edges)
    out = torch.zeros(n * k, layout.hidden)
    x, pages = floats(rng, n, layout.hidden, dtype=dtype(rng)), [raw((layout.bytes,)) for _ in range(n_pages)]
    try:
        kernels.routed(x, layout, pages, places, edges, floats(rng, n, k), out)
    except ValueError as error:
        assert str(error)


@fuzz
def test_attention(rng: Random) -> None:
    """Any shape, any bits in the cache, any position; sometimes one size is off."""
    kv_heads = rng.randrange(1, 4)
    heads = kv_heads * rng.randrange(1, 9)
    d_k, d_v, n = rng.randrange(2, 70), rng.randrange(1, 70), rng.randrange(1, 40)
    half = rng.randrange(0, d_k // 2 + 1)
    kind = rng.choice([*attention.STORES])
    extra = ROW_SCALE_BYTES if kind is torch.int8 else 0
    rows, window = n + rng.randrange(0, 200), rng.choice([None, 1, rng.randrange(1, 100)])
    first, position = rng.choice([0, rng.randrange(0, 200)]), rng.choice([n, rows, 1 << 20])
    position = rng.randrange(0, position)
    off = rng.choice([0, 0, 0, 1])
    try:
        y = attention.attend(
            floats(rng, n, heads * d_k + kv_heads * (d_k + d_v) + off),
            torch.randn(n, half), torch.randn(n, half),
            raw((kv_heads, rows, d_k + extra), kind), raw((kv_heads, rows, d_v + extra), kind),
            heads=heads, head_dims=(d_k, d_v), position=position, first=first, window=window,
            sink=rng.choice([None, floats(rng, heads)]), scale=d_k**-0.5, value_scale=1.0,
        )  # fmt: skip
    except ValueError as error:
        assert off or not attention.in_rows(n, position, window or attention.EVERYTHING, first, rows), error
    else:
        assert not off and y.shape == (n, heads * d_v)


@fuzz
def test_routers(rng: Random) -> None:
    """Whatever the numbers are, the experts chosen exist, and each once."""
    n, hidden, n_experts = rng.randrange(0, 20), rng.randrange(1, 200), rng.randrange(1, 300)
    top_k = rng.randrange(1, min(n_experts, 16) + 1)
    x, weight, bias = floats(rng, n, hidden), floats(rng, n_experts, hidden), floats(rng, n_experts)
    chosen, _ = attention.route(x, weight, bias, top_k, 1.0, rng.random() < 0.5)
    for row in chosen.tolist():
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < n_experts


@fuzz
def test_norms(rng: Random) -> None:
    n, hidden = rng.randrange(0, 20), rng.randrange(1, 200)
    x, weight = floats(rng, n, hidden), floats(rng, hidden)
    assert attention.rms_norm(x, weight, 1e-6, rng.choice([None, floats(rng, n, hidden)])).shape == x.shape


@fuzz
def test_packing(rng: Random) -> None:
    """Weights that no model should have are packed into something."""
    name = rng.choice(["nf4", "nf4-16", "mxfp4"])
    weight = floats(rng, rng.randrange(1, 70), rng.randrange(1, 100))
    scale = rng.choice([1.0, 1e-30, float("nan"), fourbit.tensor_scale(name, float(weight.abs().max()))])
    packed = kernels.encode(name, weight, scale, fourbit.book(name), *fourbit.search_space(name))
    assert packed is not None


@fuzz
def test_checksums_anywhere(rng: Random) -> None:
    data = raw((rng.randrange(0, 5000),))
    begin, end = sorted(rng.randrange(0, data.numel() + 1) for _ in range(2))
    assert 0 <= kernels.crc32(data[begin:end]) < 1 << 32
