"""Routed experts from a slab against float64: slot tables with holes, shared experts, few and many."""

import pytest
import torch

from quant import gpu
from quant.formats.page import PageLayout
from quant.gpu import FORMATS
from tests.gpu.pages import random_routing, random_slab, relative, true_rows

SLOTS = torch.tensor([-1, 2, 0, -1, 1, -1], dtype=torch.int32)


def on(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def check(layout: PageLayout, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    """Within 1.5 times the error of the same arithmetic in bfloat16, or of float32."""
    slab, (chosen, weights) = random_slab(layout, 3), random_routing(n, k, len(SLOTS), seed=n)
    x = torch.randn(n, layout.hidden, generator=torch.Generator().manual_seed(n)).to(dtype)
    rows = gpu.experts(*on(device, x), layout, *on(device, slab, SLOTS, chosen, weights)).cpu()
    wanted = true_rows(x, layout, slab, SLOTS, chosen, weights)
    if dtype == torch.float32 and n <= gpu.DECODE_TOKENS:
        limit = 2e-6
    else:
        limit = 1.5 * relative(true_rows(x, layout, slab, SLOTS, chosen, weights, torch.bfloat16), wanted)
    assert relative(rows, wanted) < limit
    absent = SLOTS[chosen] < 0
    assert absent.any() and not rows[absent].any()


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize(("n", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_few_tokens(codec: str, n: int, dtype: torch.dtype, device: str) -> None:
    check(PageLayout(codec, 40, 24), n, 4, dtype, device)


@pytest.mark.parametrize(("hidden", "inner"), [(536, 16), (16, 536)])
def test_rows_longer_than_a_step_of_the_loop(hidden: int, inner: int, device: str) -> None:
    check(PageLayout("nf4", hidden, inner), 1, 2, torch.float32, device)


def test_eight_tokens(device: str) -> None:
    check(PageLayout("nf4", 32, 16), 8, 2, torch.bfloat16, device)


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize(("n", "dtype"), [(9, torch.float32), (40, torch.bfloat16)])
def test_many_tokens(codec: str, n: int, dtype: torch.dtype, device: str) -> None:
    check(PageLayout(codec, 72, 40), n, 3, dtype, device)


def test_many_tokens_in_the_largest_tiles(device: str) -> None:
    check(PageLayout("nf4", 40, 136), 300, 2, torch.bfloat16, device)


@pytest.mark.parametrize("n", [5, 33])
def test_all_tokens_on_one_expert(n: int, device: str) -> None:
    layout = PageLayout("nf4-16", 48, 32)
    slab, x = random_slab(layout, 3), torch.randn(n, 48).bfloat16()
    chosen, weights = torch.full((n, 1), 4), torch.rand(n, 1)
    rows = gpu.experts(*on(device, x), layout, *on(device, slab, SLOTS, chosen, weights))
    assert relative(rows, true_rows(x, layout, slab, SLOTS, chosen, weights)) < 5e-3


@pytest.mark.parametrize("n", [2, 12])
def test_nothing_resident_and_wrong_numbers_give_zeros(n: int, device: str) -> None:
    layout = PageLayout("int8", 64, 64)
    slab = random_slab(layout, 2)
    chosen = torch.tensor([[1, 2, 3, 9, -1, 1 << 32]]).repeat(n, 1)
    slots = torch.tensor([0, 2, 1 << 30, -7], dtype=torch.int32)
    x, weights = torch.randn(n, 64), torch.ones(n, 6)
    rows = gpu.experts(*on(device, x), layout, *on(device, slab, slots, chosen, weights))
    assert rows.shape == (n, 6, 64) and not rows.any()


@pytest.mark.parametrize("n", [2, 20])
def test_repetition_gives_the_same_bits(n: int, device: str) -> None:
    layout = PageLayout("nf4", 64, 32)
    chosen, weights = random_routing(n, 2, len(SLOTS))
    arguments = on(device, random_slab(layout, 3), SLOTS, chosen.int(), weights)
    x = torch.randn(n, 64).bfloat16().to(device)
    assert torch.equal(gpu.experts(x, layout, *arguments), gpu.experts(x, layout, *arguments))


def test_where_a_page_lies_changes_nothing(device: str) -> None:
    layout = PageLayout("mxfp4", 64, 32)
    slab, (chosen, weights) = random_slab(layout, 3), random_routing(1, 3, 3)
    x, order = torch.randn(1, 64).bfloat16().to(device), torch.tensor([2, 0, 1])
    here = gpu.experts(x, layout, *on(device, slab, torch.arange(3, dtype=torch.int32), chosen, weights))
    there = gpu.experts(x, layout, *on(device, slab[order], order.argsort().int(), chosen, weights))
    assert torch.equal(here, there)


def test_combine_adds_in_the_order_of_places(device: str) -> None:
    rows = torch.randn(3, 5, 1030) * torch.tensor([1e4, 1.0, 1e-3, 1e4, 1.0]).view(1, 5, 1)
    wanted = torch.zeros(3, 1030)
    for p in range(5):
        wanted += rows[:, p]
    assert torch.equal(gpu.combine(rows.to(device)).cpu(), wanted)


def test_sorted_tiles_cover_every_pair_once(device: str) -> None:
    from quant.gpu import launch

    chosen, _ = random_routing(50, 3, 7)
    order, expert, first, last = (t.cpu() for t in launch.sorted_tiles(chosen.to(device), 7, 16))
    seen = []
    for e, a, b in zip(expert.tolist(), first.tolist(), last.tolist(), strict=True):
        if e < 7:
            pairs = order[a : min(a + 16, b)]
            assert len(pairs) and (chosen.view(-1)[pairs.long()] == e).all()
            seen += pairs.tolist()
    assert sorted(seen) == list(range(150))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 4, 40])
def test_captured_in_a_cuda_graph(n: int) -> None:
    """New routing, weights and slots are seen on replay, and nothing asks the host."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layout, device = PageLayout("nf4", 256, 128), "cuda"
    slab, x = random_slab(layout, 3).to(device), torch.randn(n, 256).bfloat16().to(device)
    chosen, weights, slots = *on(device, *random_routing(n, 3, len(SLOTS), seed=1)), SLOTS.to(device)
    gpu.prepare(device)
    gpu.combine(gpu.experts(x, layout, slab, slots, chosen, weights))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gpu.combine(gpu.experts(x, layout, slab, slots, chosen, weights))
    for seed in (2, 3):
        for tensor, new in zip((chosen, weights), random_routing(n, 3, len(SLOTS), seed=seed), strict=True):
            tensor.copy_(new)
        slots.copy_(slots.roll(1))
        graph.replay()
        assert torch.equal(y, gpu.combine(gpu.experts(x, layout, slab, slots, chosen, weights)))
