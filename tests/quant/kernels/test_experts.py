"""A layer's routed experts in one call, from page bytes, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from quant import kernels
from quant.formats.page import PageLayout
from quant.kernels import FORMATS
from quant.ops.experts import in_order_reference
from quant.ops.quantize import quantize
from tests.quant.kernels.isa import ISAS, needs_native, relative

pytestmark = needs_native

Tensor = torch.Tensor


@cache
def make_page(layout: PageLayout, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    page = torch.zeros(layout.bytes, dtype=torch.uint8)
    expert = layout.expert(page)
    for name in ("gate", "up", "down"):
        q = getattr(expert, name)
        weight = torch.randn(*q.shape, generator=generator) / q.shape[1] ** 0.5
        for part, values in quantize(weight, layout.codec).parts.items():
            q.parts[part].copy_(values)
    return page


def exact_output(layout: PageLayout, page: Tensor, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """One expert in the given precision, from the same quantised weights."""
    expert = layout.expert(page)
    gate, up, down = (q.dequantize().to(dtype) for q in (expert.gate, expert.up, expert.down))
    x = x.to(dtype)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@dataclass
class Layer:
    layout: PageLayout
    pages: list[Tensor]
    tokens: list[Tensor]
    weights: list[Tensor]
    x: Tensor

    def run(self) -> Tensor:
        out = torch.zeros(self.x.shape)
        return kernels.experts(self.x, self.layout, self.pages, self.tokens, self.weights, out)

    def exact(self) -> Tensor:
        out = torch.zeros(self.x.shape, dtype=torch.float64)
        for page, token, weight in zip(self.pages, self.tokens, self.weights, strict=True):
            each = exact_output(self.layout, page, self.x[token]) * weight.double().unsqueeze(1)
            out.index_add_(0, token, each)
        return out


def layer(codec: str, hidden: int, inner: int, n: int, n_experts: int = 4) -> Layer:
    layout = PageLayout(codec, hidden, inner)
    counts = [n if n < 3 else int(torch.randint(0, n + 1, ())) for _ in range(n_experts)]
    tokens = [torch.randperm(n)[:count] for count in counts]
    weights = [torch.rand(count) for count in counts]
    pages = [make_page(layout, e) for e in range(n_experts)]
    return Layer(layout, pages, tokens, weights, torch.randn(n, hidden))


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("size", [(256, 128), (70, 50), (33, 97), (64, 16)])
@pytest.mark.parametrize("n", [1, 7, 60])
def test_against_float64(codec: str, size: tuple[int, int], n: int) -> None:
    case = layer(codec, *size, n)
    exact = case.exact()
    outputs = {}
    for name in ISAS:
        kernels.force(name)
        outputs[name] = case.run()
        kernels.force(None)
        assert relative(outputs[name], exact) < 6e-4, name
    assert all(torch.equal(y, outputs["portable"]) for y in outputs.values())


@pytest.mark.parametrize("codec", FORMATS)
def test_within_the_error_of_bf16(codec: str) -> None:
    layout = PageLayout(codec, 512, 256)
    page, x = make_page(layout, 1), torch.randn(300, 512)
    exact = exact_output(layout, page, x)
    case = Layer(layout, [page], [torch.arange(300)], [torch.ones(300)], x)
    theirs = exact_output(layout, page, x, torch.bfloat16)
    assert relative(case.run(), exact) < 0.2 * relative(theirs, exact)


def test_outputs_depend_on_nothing_else_in_the_call() -> None:
    case = layer("nf4", 96, 64, 40, n_experts=5)
    whole = case.run()
    for n in (1, 2, 3):
        kernels.set_threads(n)
        assert torch.equal(whole, case.run())
    one_by_one = torch.zeros_like(whole)
    for page, token, weight in zip(case.pages, case.tokens, case.weights, strict=True):
        for t, w in zip(token.tolist(), weight.tolist(), strict=True):
            alone = Layer(case.layout, [page], [torch.tensor([0])], [torch.tensor([w])], case.x[t : t + 1])
            one_by_one[t] += alone.run()[0]
    assert torch.equal(whole, one_by_one)


def test_rows_hold_the_terms_of_the_sum() -> None:
    case = layer("nf4", 96, 64, 10, n_experts=3)
    n_terms = sum(len(token) for token in case.tokens)
    rows = list(torch.arange(n_terms).split([len(token) for token in case.tokens]))
    terms = torch.full((n_terms, 96), torch.nan)
    kernels.experts(case.x, case.layout, case.pages, case.tokens, case.weights, terms, rows=rows)
    total = torch.zeros(10, 96)
    for token, row in zip(case.tokens, rows, strict=True):
        total[token] += terms[row]
    assert torch.equal(total, case.run())


@pytest.mark.parametrize(("n", "k"), [(1, 3), (30, 2)])
def test_places_of_a_router(n: int, k: int) -> None:
    """The call without a tensor per expert does what the one with them does."""
    case = layer("nf4", 96, 64, n, n_experts=5)
    chosen = torch.stack([torch.randperm(5)[:k].sort().values for _ in range(n)])
    weights, places = torch.rand(n, k), chosen.reshape(-1).argsort(stable=True)
    stops = torch.bincount(chosen.reshape(-1), minlength=5).cumsum(0).tolist()
    edges = [edge for span in zip([0, *stops], stops, strict=False) for edge in span]
    out, expected = torch.full((n * k, 96), torch.nan), torch.full((n * k, 96), torch.nan)
    kernels.routed(case.x, case.layout, case.pages[:2], places, edges[:4], weights, out)
    kernels.routed(case.x, case.layout, case.pages[2:], places, edges[4:], weights, out)
    rows = [places[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    shares = [weights.reshape(-1)[row] for row in rows]
    kernels.experts(case.x, case.layout, case.pages, [row // k for row in rows], shares, expected, rows)
    assert torch.equal(out, expected)

    def refused(message: str, **change: object) -> None:
        call: dict[str, object] = {
            "x": case.x,
            "layout": case.layout,
            "pages": case.pages[:1],
            "places": places,
        }
        call |= {"spans": [0, 1], "weights": weights, "out": out}
        with pytest.raises(ValueError, match=message):
            kernels.routed(**{**call, **change})  # type: ignore[arg-type]

    refused("outside", spans=[0, n * k + 1])
    refused("outside", spans=[-1, 1])
    refused("outside", spans=[1, 0])
    refused("needs its span", spans=[0])
    refused("exist", places=torch.full((n * k,), n * k))
    refused("same row", places=places[:1].repeat(2), spans=[0, 2])
    refused("were expected", places=places.int())
    refused("were expected", out=out[1:])
    refused("weights is", weights=weights.double())


def test_bfloat16_input_and_many_tokens() -> None:
    case = layer("nf4", 64, 32, 300, n_experts=2)
    case.x = case.x.bfloat16()
    assert relative(case.run(), case.exact()) < 6e-4


def test_wrong_arguments_are_refused() -> None:
    case = layer("nf4", 64, 32, 4, n_experts=1)
    page, token, weight = case.pages[0], torch.arange(4), torch.ones(4)
    out = torch.zeros(4, 64)

    def refused(message: str, **change: object) -> None:
        call: dict[str, object] = {
            "x": case.x,
            "layout": case.layout,
            "pages": [page],
            "tokens": [token],
            "weights": [weight],
            "out": out,
        }
        with pytest.raises(ValueError, match=message):
            kernels.experts(**{**call, **change})  # type: ignore[arg-type]

    refused("A page is", pages=[page[:-1]])
    refused("A page is", pages=[page.float()])
    refused("A page is", pages=[torch.zeros(2 * page.numel(), dtype=torch.uint8)[::2]])
    refused("x is", x=case.x.double())
    refused("x is", x=torch.randn(4, 65))
    refused("x is", x=torch.randn(64, 4).T)
    refused("out is", out=out.bfloat16())
    refused("out has 3", out=out[:3])
    refused("exist", tokens=[torch.tensor([0, 1, 2, 4])])
    refused("exist", tokens=[torch.tensor([0, 1, 2, -1])])
    refused("tokens are", tokens=[token.float()])
    refused("weights are", weights=[weight.long()])
    refused("with 2 dimensions", tokens=[token[:, None]])
    refused("lists of .3., tokens of .4.", weights=[weight[:3]])
    refused("1 token lists", pages=[page, page])
    refused("No native kernel", layout=PageLayout("bf16", 64, 32))
    refused("same row", rows=[torch.tensor([0, 1, 2, 2])])
    refused("exist", rows=[torch.tensor([0, 1, 2, 4])])


def test_nothing_to_do() -> None:
    case = layer("nf4", 64, 32, 4, n_experts=1)
    out = torch.ones(4, 64)
    kernels.experts(case.x, case.layout, [], [], [], out)
    none = torch.empty(0, dtype=torch.int64)
    kernels.experts(case.x, case.layout, case.pages, [none], [torch.empty(0)], out)
    assert torch.equal(out, torch.ones(4, 64))


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 4, 70), (16, 8, 2048)])
def test_terms_are_added_first_to_last(shape: tuple[int, int, int]) -> None:
    terms = torch.randn(shape) * torch.rand(shape).exp2() ** 9  # so that the order shows
    assert torch.equal(kernels.add_in_order(terms), in_order_reference(terms))
    for bad in (terms.double(), torch.randn(3, 4, 70)[:, :, 1:], terms[:, :0]):
        with pytest.raises(ValueError, match="expected"):
            kernels.add_in_order(bad)
