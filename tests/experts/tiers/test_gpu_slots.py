"""The GPU tier, with the device "cpu": who is uploaded, that it pays back, and that placement never changes a sum."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localmimo.experts.compute.cpu_runner import ExpertRunner
from localmimo.experts.compute.hybrid_runner import HybridRunner
from localmimo.experts.policy.baselines import Lru, Page
from localmimo.experts.policy.promotion import HORIZON, Costs, Swap, choose, most_uploads, pays_back
from localmimo.experts.store.store import ExpertStore
from localmimo.experts.tiers.gpu_slots import EVERY, GpuSlots
from localmimo.experts.tiers.tiers import GpuTier
from localmimo.kv.block_table import BlockTable
from quant import Pack
from quant.pack.pack import experts_of
from tests.gpu.pages import relative

CHEAP = Costs(saved_s=1e-3, upload_s=1e-3)


@pytest.fixture(scope="module")
def pack(packs: Callable[[str], Path]) -> Iterator[Pack]:
    with Pack.open(packs("nf4-experts")) as pack:
        yield pack


def gpu_slots(pack: Pack, n_slots: int, chances: Mapping[Page, float], costs: Costs = CHEAP) -> GpuSlots:
    def of(pages: Sequence[Page]) -> Mapping[Page, float]:
        return {page: chances.get(page, 0.0) for page in pages}

    assert pack.page is not None
    tier = GpuTier(n_slots, pack.page.bytes, torch.device("cpu"))
    return GpuSlots(tier, pack.page, experts_of(pack), of, costs)


def test_a_copy_must_pay_back() -> None:
    even = CHEAP.upload_s / (HORIZON * CHEAP.saved_s)
    assert pays_back(even * 1.01, 0.0, CHEAP)
    assert not pays_back(even * 0.99, 0.0, CHEAP)
    assert not pays_back(0.9, 0.9, CHEAP)
    assert not pays_back(1.0, 0.0, Costs(saved_s=-1e-3, upload_s=1e-3))  # the GPU is no faster


def test_copies_take_a_quarter_of_the_time_at_most() -> None:
    assert most_uploads(0.4, Costs(1e-3, 0.01)) == 10
    assert most_uploads(0.001, Costs(1e-3, 0.01)) == 1


pages = st.tuples(st.integers(1, 4), st.integers(0, 7))


@given(
    st.dictionaries(pages, st.floats(0, 1)),
    st.dictionaries(pages, st.floats(0, 1)),
    st.integers(0, 5),
    st.integers(0, 9),
)
def test_choices(ram: dict[Page, float], gpu: dict[Page, float], n_free: int, most: int) -> None:
    gpu = {page: chance for page, chance in gpu.items() if page not in ram}
    swaps = choose(ram, gpu, n_free, most, CHEAP)
    assert len(swaps) <= most
    assert len({swap.page for swap in swaps}) == len(swaps)
    uploading = [swap.instead for swap in swaps if swap.instead is not None]
    assert len(set(uploading)) == len(uploading)
    assert len(swaps) - len(uploading) <= n_free
    for swap in swaps:
        assert swap.instead is None or pays_back(ram[swap.page], gpu[swap.instead], CHEAP)
    if swaps and most < len(ram):
        assert min(ram[swap.page] for swap in swaps) >= sorted(ram.values(), reverse=True)[most - 1]


def test_the_likelier_page_takes_the_place_of_the_least_likely() -> None:
    swaps = choose({(1, 0): 0.5, (1, 1): 0.9}, {(2, 0): 0.8, (2, 1): 0.1}, 0, 1, CHEAP)
    assert swaps == [Swap((1, 1), (2, 1))]


def routed(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(8, generator=generator)[:2].sort().values for _ in range(n)])
    return torch.randn(n, 64, generator=generator), chosen, torch.rand(n, 2, generator=generator)


def test_placement_changes_no_sum_and_no_page_is_lost(pack: Pack) -> None:
    """Steps and prompts with pages that wander to the GPU tier and back, against a store without one."""
    assert pack.page is not None
    draw = random.Random(5)
    chances: dict[Page, float] = {}
    gpu = gpu_slots(pack, 6, chances)
    tiered = ExpertStore(pack, pack.page.bytes, 12, Lru(5, 8), gpu=gpu)
    plain = ExpertStore(pack, pack.page.bytes, 12, Lru(5, 8))
    shared = HybridRunner(tiered, pack.page.bytes, torch.device("cpu"))
    for step in range(12 * EVERY):
        if step % (3 * EVERY) == 0:
            chances.update({(layer, e): draw.random() for layer in (1, 2, 3, 4) for e in range(8)})
        for layer in (1, 2, 3, 4):
            n = {50: 40, 51: 300}.get(step, draw.choice((1, 3)))
            x, chosen, weights = routed(n, 10 * step + layer)
            got = shared.run(layer, x, chosen, weights)
            wanted = ExpertRunner(plain).run(layer, x, chosen, weights)
            assert torch.equal(got, wanted) or (n == 300 and relative(got, wanted) < 1e-5)
            assert not set(gpu) & (set(tiered._slots) - set(gpu.uploading))
        assert tiered._slots.n_accounted + len(tiered._prefetches) == 12
        assert len(list(gpu)) <= 6
    assert tiered.counters.gpu_pages > 0
    assert tiered.counters.uploads > 6
    assert {"ram", "gpu"} == set(tiered.where().values())
    tiered.close()
    plain.close()


def test_free_slots_are_filled_and_then_nothing_moves_where_it_does_not_pay(pack: Pack) -> None:
    assert pack.page is not None
    gpu = gpu_slots(pack, 2, {(layer, e): 1.0 for layer in (1, 2) for e in range(8)}, Costs(1e-6, 1.0))
    store = ExpertStore(pack, pack.page.bytes, 12, Lru(5, 8), gpu=gpu)
    for _ in range(4 * EVERY):
        for layer in (1, 2):
            store.begin_layer(layer)
            for _ in store.fetch(layer, [0, 1, 2]):
                pass
    assert store.counters.uploads == 2
    store.close()


def test_pages_that_a_prompt_streamed_through_may_go_to_the_gpu(pack: Pack) -> None:
    """They leave the ring with their slots: what takes slots afterwards must not find them there."""
    assert pack.page is not None
    store = ExpertStore(pack, pack.page.bytes, 8, Lru(5, 8), gpu=gpu_slots(pack, 16, {}))
    shared = HybridRunner(store, pack.page.bytes, torch.device("cpu"))
    plain = ExpertRunner(ExpertStore(pack, pack.page.bytes, 8, Lru(5, 8)))
    for step in range(30):
        for layer in (1, 2, 3, 4):
            asked = layer, *routed(40 if step % 5 == 0 else 1, 10 * step + layer)
            assert torch.equal(shared.run(*asked), plain.run(*asked))
    assert store.counters.uploads == 16
    store.close()


def test_where_every_expert_of_a_layer_lies_here_the_host_is_not_asked(pack: Pack) -> None:
    assert pack.page is not None
    gpu = gpu_slots(pack, 8, {})
    store = ExpertStore(pack, pack.page.bytes, 12, Lru(5, 8), gpu=gpu)
    assert store.promote([(2, e) for e in range(8)]) == 8 and gpu.has_all(2) and not gpu.has_all(1)
    shared, alone = HybridRunner(store, pack.page.bytes, torch.device("cpu")), []
    shared._transfer.down = lambda *tensors: pytest.fail("the host asked")  # type: ignore[method-assign]
    for step in range(3):
        x, chosen, weights = routed(2, step)
        alone.append(shared.run(2, x, chosen, weights))
        assert store.counters.gpu_pages == sum(len(routed(2, s)[1].unique()) for s in range(step + 1))
    assert store.counters.ram_pages == 0
    store.close()


def test_slots_are_given_back_and_the_sums_stay(pack: Pack) -> None:
    assert pack.page is not None
    gpu = gpu_slots(pack, 8, {})
    store = ExpertStore(pack, pack.page.bytes, 12, Lru(5, 8), gpu=gpu)
    store.promote([(2, e) for e in range(8)])
    shared = HybridRunner(store, pack.page.bytes, torch.device("cpu"))
    before = shared.run(2, *routed(3, 1))
    uploaded = []
    while shared.shrink():
        uploaded.append(gpu.n_slots)
        assert not list(gpu) and torch.equal(shared.run(2, *routed(3, 1)), before)
    assert uploaded == [6, 4, 3, 2, 1, 0]
    store.close()


class Requests(Lru):
    """Remembers what was asked for."""

    def __init__(self) -> None:
        super().__init__(5, 8)
        self.asked: list[tuple[int, list[int]]] = []

    def request(self, layer: int, experts: Sequence[int]) -> None:
        self.asked.append((layer, list(experts)))
        super().request(layer, experts)


def test_pages_are_counted_in_the_tier_where_they_were_found(pack: Pack) -> None:
    assert pack.page is not None
    store = ExpertStore(pack, pack.page.bytes, 16, Lru(5, 8), gpu=gpu_slots(pack, 4, {}), prefetch=False)
    assert store.promote([(2, expert) for expert in range(4)]) == 4
    found = []
    for ask, experts in ((store.fetch, [0, 1, 5]), (store.fetch, [0, 1, 5]), (store.stream, range(8))):
        before = store.counters.copy()
        for _ in ask(2, experts):
            pass
        found.append(store.counters.since(before).by_tier)
    assert found == [
        {"gpu": 2, "ram": 0, "disk": 1},
        {"gpu": 2, "ram": 1, "disk": 0},
        {"gpu": 4, "ram": 1, "disk": 3},
    ]
    assert store.counters.n_pages == 14
    store.close()


def test_steps_on_the_gpu_are_counted_before_what_comes_after_them(pack: Pack) -> None:
    assert pack.page is not None
    policy = Requests()
    store = ExpertStore(pack, pack.page.bytes, 16, policy, gpu=gpu_slots(pack, 4, {}))
    store.deferred.note(1, torch.tensor([[0, 3]]))
    for _ in store.fetch(2, [1]):
        pass
    assert policy.asked == [(1, [0, 3]), (2, [1])]
    store.begin_layer(3)
    store.deferred.note(3, torch.tensor([[4, 5]]))
    store.begin_layer(1)  # another token: what pays back on the GPU is decided anew
    assert policy.asked[2:] == [(3, [4, 5])]
    store.close()


def test_keys_and_values_take_the_slots_of_the_least_likely_pages(pack: Pack) -> None:
    assert pack.page is not None
    gpu = gpu_slots(pack, 4, {(2, 0): 0.9, (2, 1): 0.1, (2, 2): 0.8, (2, 3): 0.2})
    store = ExpertStore(pack, pack.page.bytes, 8, Lru(5, 8), gpu=gpu)
    store.promote([(2, expert) for expert in range(4)])
    blocks = BlockTable(gpu, 16, 64)
    blocks.reserve(32)
    assert set(gpu) == {(2, 0), (2, 2)} and gpu.n_slots == 2
    store.close()
