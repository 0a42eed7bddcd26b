"""Policies: whom they name, and that none ever names a page that must stay or that is not held."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.routing import Shape, fickle, trace_of
from localmimo.experts.policy.baselines import Adaptive, Belady, Lfu, Lru, Page, Policy
from localmimo.experts.policy.recency import Recency
from localmimo.experts.policy.replay import replay
from localmimo.experts.policy.router_stats import RouterStats

LAYERS, N_EXPERTS = (1, 2, 4), 8
lines = st.lists(
    st.tuples(st.sampled_from(LAYERS), st.sets(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=4)),
    max_size=40,
)


def belady(trace: list[tuple[int, set[int]]]) -> Belady:
    return Belady(
        np.array(
            [layer * 8 + expert for layer, experts in trace for expert in sorted(experts)], dtype=np.int64
        ),
        8,
    )


POLICIES: dict[str, Callable[[list[tuple[int, set[int]]]], Policy]] = {
    "lru": lambda trace: Lru(5, N_EXPERTS),
    "lfu": lambda trace: Lfu(5, N_EXPERTS),
    "belady": belady,
    "ours": lambda trace: Adaptive(RouterStats(LAYERS, N_EXPERTS)),
}


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None)
@given(trace=lines, n_slots=st.integers(1, 20), n_extra=st.integers(0, 3))
def test_victims_are_held_and_not_kept(
    name: str, trace: list[tuple[int, set[int]]], n_slots: int, n_extra: int
) -> None:
    policy, held = POLICIES[name](trace), set[Page]()
    for layer, experts in trace:
        policy.request(layer, sorted(experts))
        keep = {(layer, expert) for expert in experts}
        for page in sorted(keep - held):
            if len(held) >= n_slots:
                going = policy.victims(1 + n_extra, keep)
                assert len(set(going)) == len(going) == min(1 + n_extra, len(held - keep))
                assert set(going) <= held - keep
                if not going:
                    continue
                policy.drop(going[0])
                held.discard(going[0])
            policy.admit(page)
            held.add(page)
        assert len(held) <= n_slots
        everything = policy.victims(100, ())
        assert set(everything) == held and len(everything) == len(held)


def fed(policy: Policy, requests: list[Page]) -> Policy:
    for layer, expert in requests:
        policy.request(layer, [expert])
        policy.admit((layer, expert))
    return policy


def test_lru_names_the_longest_unasked() -> None:
    lru = fed(Lru(5, 8), [(1, 0), (1, 1), (1, 2), (1, 0)])
    assert lru.victims(1, {(1, 1)}) == [(1, 2)]
    assert lru.victims(9, ()) == [(1, 1), (1, 2), (1, 0)]
    lru.drop((1, 1))
    assert lru.victims(9, ()) == [(1, 2), (1, 0)]


def test_lru_goes_by_requests_not_by_arrivals() -> None:
    """A page in RAM is not admitted again when it is asked for; pages of one request arrive in any order."""
    lru = Lru(5, 8)
    lru.request(1, [0, 1, 2])
    for expert in (2, 1, 0):
        lru.admit((1, expert))
    assert lru.victims(9, ()) == [(1, 0), (1, 1), (1, 2)]
    lru.request(1, [0])
    assert lru.victims(9, ()) == [(1, 1), (1, 2), (1, 0)]


def test_lfu_names_the_least_asked_then_the_longest_unasked() -> None:
    lfu = fed(Lfu(5, 8), [(1, 0), (1, 0), (1, 1), (1, 2)])
    assert lfu.victims(9, ()) == [(1, 1), (1, 2), (1, 0)]
    lfu.drop((1, 0))
    lfu.request(1, [0])
    lfu.admit((1, 0))  # what it was asked for before still counts
    assert lfu.victims(1, {(1, 1), (1, 2)}) == [(1, 0)]


def test_belady_names_the_farthest() -> None:
    policy = fed(Belady(np.array([8, 9, 10, 9, 8]), 8), [(1, 0), (1, 1), (1, 2)])
    assert policy.victims(9, ()) == [(1, 2), (1, 0), (1, 1)]


def test_ours_keeps_what_is_used_always_and_what_comes_next() -> None:
    policy = Adaptive(RouterStats(LAYERS, N_EXPERTS))
    for token in range(40):
        for layer in LAYERS:
            policy.request(layer, [0, 1 + token % 7])
            for expert in (0, 1 + token % 7):
                policy.admit((layer, expert))
    order = policy.victims(100, ())
    assert set(order[-6:]) == {(layer, expert) for layer in LAYERS for expert in (0, 1 + 40 % 7)}


def test_between_forecasts_the_pages_used_now_stay_and_their_layer_has_had_its_turn() -> None:
    """Forty layers: a forecast serves several of them."""
    policy = Adaptive(RouterStats(range(40), 4))
    for layer in range(40):
        for expert in range(4):
            policy.admit((layer, expert))
    first = policy.victims(1, ())  # the next victims are looked up in advance
    assert first[0][0] == 39  # its turn is farthest away
    policy.request(0, [2])
    assert set(policy.victims(3, ())) == {(0, 0), (0, 1), (0, 3)}
    assert policy.victims(160, ())[-1] == (0, 2)


@pytest.mark.parametrize("name", ["lru", "lfu", "ours"])
def test_a_page_that_must_stay_is_never_named(name: str) -> None:
    policy = fed(POLICIES[name]([]), [(1, expert) for expert in range(6)])
    keep = {(1, expert) for expert in range(0, 6, 2)}
    assert sorted(policy.victims(9, keep)) == [(1, 1), (1, 3), (1, 5)]
    assert policy.victims(1, [(1, expert) for expert in range(6)]) == []
    assert len(policy.victims(9, ())) == 6


def test_a_policy_with_a_slot_for_every_page_learns_once_slots_are_taken_away() -> None:
    """Until then it only counts; what it names afterwards follows what is used afterwards."""
    policy = Adaptive(RouterStats([1], 4), room_for_all=True)
    for expert in range(4):
        policy.request(1, [expert])
        policy.admit((1, expert))
    assert len(policy.victims(1, ())) == 1
    for _ in range(30):
        policy.request(1, [1, 3])
    assert set(policy.victims(2, ())) == {(1, 0), (1, 2)}
    for _ in range(60):
        policy.request(1, [0, 2])
    assert set(policy.victims(2, ())) == {(1, 1), (1, 3)}


def test_traffic_that_forgets_is_served_as_lru_would() -> None:
    """Experts that stay for a while and then all change: how often a page was used once is of no use."""
    rng = np.random.default_rng()
    for _ in range(4):
        seed, every = int(rng.integers(1 << 31)), int(rng.integers(5, 20))
        trace = trace_of(fickle(seed, Shape(8, 32, 4, 120), 0.95, every))
        for slots in (38, 54, 80):
            played = replay(trace, slots)
            assert played.ours > played.lru - 0.01, (seed, every, slots)


def test_chances_by_age() -> None:
    """Three pages in turn."""
    stats = RouterStats([1], 4)
    ages = Recency(stats)
    for turn in range(90):
        chosen = [turn % 3] if turn % 3 else [3]
        buckets = ages.buckets(np.array([0]))
        ages.learn(0, buckets, buckets[0, chosen])
        stats.request(1, chosen)
        stats.settle()
    soon, later = ages.chances(0.25)
    assert soon[3] > 0.9 and soon[1:3].max() < 0.1  # every used page comes back in its third turn
    assert np.allclose(later, 0.25)  # nothing was learnt about later
    assert ages.buckets()[0, 0] == len(soon) - 1  # never used
