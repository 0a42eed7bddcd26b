"""Native attention, norms and the router against torch, and the promise that a row's result is its own."""

from __future__ import annotations

import pytest
import torch

from localmimo.kv.cache import row_width
from localmimo.model.attention import Rows, extend_reference, rope_table
from localmimo.model.config import LayerSpec
from localmimo.model.transformer import route_reference
from quant import kernels
from quant.kernels import attention
from tests.quant.kernels.isa import ISAS, needs_native, relative

pytestmark = needs_native
# Over a bf16 cache queries and weights are rounded to bf16 too, over int8 to 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.int8: 3e-2}
SHAPES = {  # heads, kv_heads, d_k, d_v, rotary, window
    "mini": (4, 2, 96, 64, 32, None),
    "mini window": (4, 4, 96, 64, 32, 128),
    "flash": (16, 1, 192, 128, 64, None),
    "flash window": (16, 2, 192, 128, 64, 128),
    "odd": (6, 2, 37, 21, 10, None),
    "odd window": (3, 3, 23, 17, 8, 9),
}


@pytest.fixture(autouse=True)
def as_found():  # type: ignore[no-untyped-def]
    threads = kernels.threads()
    yield
    kernels.force(None)
    kernels.set_threads(threads)


def layer_of(name: str) -> LayerSpec:
    heads, kv_heads, d_k, d_v, rotary, window = SHAPES[name]
    kind = "global" if window is None else "window"
    return LayerSpec(kind, "moe", heads, kv_heads, d_k, d_v, rotary, 1e4, window, window is not None)


def cache(spec: LayerSpec, length: int, dtype: torch.dtype) -> Rows:
    shapes = [(spec.n_kv_heads, length, row_width(d, dtype)) for d in (spec.head_dim, spec.v_head_dim)]
    return Rows(*(torch.zeros(shape, dtype=dtype) for shape in shapes))


def run(spec: LayerSpec, x: torch.Tensor, rows: Rows, position: int, cuts: list[int], f=None) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Extend by the rows of x in pieces that end at `cuts`."""
    sink = torch.linspace(-2, 2, spec.n_heads) if spec.sink else None
    parts, done = [], 0
    for end in [*cuts, len(x)]:
        rope = rope_table(torch.arange(position + done, position + end), *spec.rope)
        arguments = (x[done:end], rope, rows, position + done, spec, sink, 0.7)
        parts.append((f or native)(*arguments))
        done = end
    return torch.cat(parts)


def native(x, rope, rows, position, spec, sink, value_scale):  # type: ignore[no-untyped-def]
    return attention.attend(
        x.contiguous(), *rope, rows.keys, rows.values, heads=spec.n_heads,
        head_dims=(spec.head_dim, spec.v_head_dim), position=position, first=rows.first, window=spec.window,
        sink=sink, scale=spec.head_dim**-0.5, value_scale=value_scale,
    )  # fmt: skip


def random(spec: LayerSpec, n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, sum(spec.qkv_rows), generator=torch.Generator().manual_seed(seed)) * 1.5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", SHAPES)
def test_against_torch(name: str, dtype: torch.dtype, isa: str) -> None:
    if isa == "portable" and "flash" in name:
        pytest.skip("seconds without an instruction for fma")
    kernels.force(isa)
    spec, n = layer_of(name), 560
    x, theirs, ours = random(spec, n, 3), cache(spec, n, dtype), cache(spec, n, dtype)
    expected = run(spec, x, theirs, 0, [540], extend_reference)
    got = run(spec, x, ours, 0, [540])
    assert torch.equal(theirs.keys, ours.keys) and torch.equal(theirs.values, ours.values)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["mini", "flash", "flash window", "odd"])
def test_rounding_costs_less_than_arithmetic_in_bf16(name: str) -> None:
    """Root mean square errors against exact attention over the same bf16 cache: ours below half of a bf16 model's."""
    spec, n = layer_of(name), 700
    x, rows = random(spec, n, 11), cache(spec, n, torch.bfloat16)
    got = run(spec, x, rows, 0, [])
    exact = run(spec, x, cache(spec, n, torch.bfloat16), 0, [], extend_reference).double()
    assert relative(got, exact) < 0.5 * relative(in_bf16(spec, x, rows), exact)


@pytest.mark.parametrize("name", ["mini", "flash", "flash window", "odd"])
def test_queries_and_weights_in_int8_cost_no_more_than_the_cache_in_int8(name: str) -> None:
    spec, n = layer_of(name), 700
    x = random(spec, n, 12)
    exact = run(spec, x, cache(spec, n, torch.float32), 0, [], extend_reference).double()
    stored = run(spec, x, cache(spec, n, torch.int8), 0, [], extend_reference)
    got = run(spec, x, cache(spec, n, torch.int8), 0, [])
    assert relative(got, exact) < 1.6 * relative(stored, exact)


def in_bf16(spec: LayerSpec, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Attention as a bf16 model computes it: scores, weights and output are rounded to bf16, too."""
    n, heads = len(x), spec.n_heads
    (cos, sin), half = rope_table(torch.arange(n), *spec.rope), spec.rope[0] // 2
    q = x[:, : heads * spec.head_dim].view(n, heads, -1)
    a, b, rest = q.split([half, half, spec.head_dim - 2 * half], -1)
    turn, back = cos[:, None], sin[:, None]
    q = torch.cat([a * turn - b * back, b * turn + a * back, rest], -1).bfloat16()
    keys, values = (t[:, :n].repeat_interleave(heads // spec.n_kv_heads, 0) for t in (rows.keys, rows.values))
    scores = torch.einsum("thd,hsd->hts", q, keys).float() * spec.head_dim**-0.5
    ago = torch.arange(n)[:, None] - torch.arange(n)
    scores = scores.masked_fill((ago < 0) | (ago >= (spec.window or n)), -torch.inf)
    if spec.sink:
        scores = torch.cat([scores, torch.linspace(-2, 2, heads)[:, None, None].expand(heads, n, 1)], -1)
    weights = scores.softmax(-1).bfloat16()[..., :n]
    return torch.einsum("hts,hsd->thd", weights, values).reshape(n, -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", ["mini", "flash", "flash window", "odd", "odd window"])
def test_a_row_depends_on_itself_alone(name: str, dtype: torch.dtype) -> None:
    """Pieces, threads and instruction sets: always the same bits, from the first position into the second section."""
    spec, n = layer_of(name), 600
    x = random(spec, n, 4)
    kernels.set_threads(1)
    expected = run(spec, x, cache(spec, n, dtype), 0, [])
    cuts = [[1, 2, 515, 516, 590], [599], list(range(580, 600)), [300, 301, 317]]
    for i, (threads, isa) in enumerate([(1, None), (2, None), (1, "avx2"), (3, None)]):
        kernels.set_threads(threads)
        kernels.force(isa if isa in ISAS else None)
        assert torch.equal(run(spec, x, cache(spec, n, dtype), 0, cuts[i]), expected)


def test_portable_gives_the_same_bits() -> None:
    spec = layer_of("odd window")
    x = random(spec, 100, 5)
    expected = run(spec, x, cache(spec, 100, torch.int8), 0, [])
    kernels.force("portable")
    assert torch.equal(run(spec, x, cache(spec, 100, torch.int8), 0, [50]), expected)


def test_far_positions_and_growing_sections() -> None:
    """At 40,000 positions sections have other sizes; the last tokens one by one or together."""
    spec, n = layer_of("odd"), 40_000
    rows = cache(spec, n + 20, torch.bfloat16)
    rows.keys.normal_(), rows.values.normal_()
    x = random(spec, 20, 6)
    expected = run(spec, x, rows, n, [], extend_reference)
    together, alone = run(spec, x, rows, n, []), run(spec, x, rows, n, list(range(1, 20)))
    assert torch.equal(together, alone)
    torch.testing.assert_close(together, expected, rtol=0, atol=8e-3 * float(expected.abs().max()))


def test_large_logits_and_a_sink_that_takes_all() -> None:
    spec = layer_of("mini window")
    x = random(spec, 300, 7) * 40
    expected = run(spec, x, cache(spec, 300, torch.float32), 0, [], extend_reference)
    got = run(spec, x, cache(spec, 300, torch.float32), 0, [])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("what", ["query", "key", "value"])
def test_what_is_not_finite_shows(what: str, dtype: torch.dtype, isa: str) -> None:
    kernels.force(isa)
    spec = layer_of("mini")
    x = random(spec, 90, 13)
    queries, keys = spec.n_heads * spec.head_dim, (spec.n_heads + spec.n_kv_heads) * spec.head_dim
    x[70, {"query": 5, "key": queries + 5, "value": keys + 5}[what]] = torch.nan
    got = run(spec, x, cache(spec, 90, dtype), 0, [])
    assert got[:64].isfinite().all() and got[70, 5].isnan()
    assert what == "query" or got[71:, 5].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "hidden"), [(1, 256), (5, 4096), (3, 71), (700, 512)])
def test_norm(n: int, hidden: int, isa: str) -> None:
    kernels.force(isa)
    x, add = torch.randn(n, hidden) * 3, torch.randn(n, hidden)
    weight = torch.rand(hidden) + 0.5
    exact = (x + add).double()
    exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    whole = x.clone()
    got = attention.rms_norm(whole, weight, 1e-5, add)
    assert torch.equal(whole, x + add)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    each = [attention.rms_norm(row[None].contiguous(), weight, 1e-5) for row in whole]
    assert torch.equal(torch.cat(each), got)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("n", "hidden", "experts", "k"), [(1, 256, 32, 4), (9, 72, 7, 3), (300, 512, 256, 8)]
)
def test_router(n: int, hidden: int, experts: int, k: int, isa: str) -> None:
    kernels.force(isa)
    x, weight, bias = torch.randn(n, hidden), torch.randn(experts, hidden) / hidden**0.5, torch.randn(experts)
    chosen, weights = attention.route(x, weight, bias, k, 1.5, True)
    expected, shares = route_reference(x, weight, bias, k, 1.5, True)
    same = (chosen == expected).all(-1)
    assert same.float().mean() > 0.98  # two scores may be equal to the last bits
    torch.testing.assert_close(weights[same], shares[same], rtol=1e-5, atol=1e-6)
    alone = [attention.route(row[None].contiguous(), weight, bias, k, 1.5, True) for row in x]
    assert torch.equal(torch.cat([c for c, _ in alone]), chosen)
    assert torch.equal(torch.cat([w for _, w in alone]), weights)


def test_equal_experts_go_by_number() -> None:
    x, weight = torch.randn(2, 16), torch.zeros(6, 16)
    chosen, weights = attention.route(x, weight, torch.zeros(6), 3, 1.0, True)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))


def test_what_does_not_fit_is_refused() -> None:
    spec = layer_of("mini")
    x, rows = random(spec, 2, 8), cache(spec, 10, torch.bfloat16)
    with pytest.raises(ValueError, match="do not go with"):
        run(spec, x[:, :-1], rows, 0, [])
    with pytest.raises(ValueError, match="do not go with"):
        run(spec, x, Rows(rows.keys.half(), rows.values.half()), 0, [])
    with pytest.raises(ValueError, match="do not go with"):
        run(spec, random(spec, 11, 8), rows, 0, [])
    with pytest.raises(ValueError, match="do not fit"):
        attention.route(torch.randn(2, 8), torch.randn(4, 8), torch.randn(4), 5, 1.0, True)
