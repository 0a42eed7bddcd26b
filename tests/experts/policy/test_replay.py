"""Replay and traces: equal to naive simulations, never more pages than slots, bad files named line by line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmimo.errors import BadRequest
from localmimo.experts.policy import trace as trace_room
from localmimo.experts.policy.baselines import Adaptive, Page
from localmimo.experts.policy.replay import play, replay
from localmimo.experts.policy.router_stats import RouterStats
from localmimo.experts.policy.trace import Trace, TraceWriter, read_trace

JsonLines = list[tuple[int, list[int]]]
lines = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True)),
    min_size=1, max_size=60,
)  # fmt: skip


def trace_of(lines: JsonLines) -> Trace:
    trace = Trace()
    for layer, experts in lines:
        trace.add(layer, experts)
    return trace


def naive(lines: JsonLines, slots: int, victim: Callable[[list[Page], list[Page], int], Page]) -> int:
    """Hits page by page; victim chooses among the held ones, given all requests and the place of the present one."""
    pages = [(layer, expert) for layer, experts in lines for expert in experts]
    held: list[Page] = []
    hits = 0
    for place, page in enumerate(pages):
        if page in held:
            hits += 1
        else:
            if len(held) == slots:
                held.remove(victim(held, pages, place))
            held.append(page)
    return hits


def last_use(page: Page, pages: list[Page], place: int) -> int:
    return max(i for i in range(place) if pages[i] == page)


def lru(held: list[Page], pages: list[Page], place: int) -> Page:
    return min(held, key=lambda page: last_use(page, pages, place))


def lfu(held: list[Page], pages: list[Page], place: int) -> Page:
    return min(held, key=lambda page: (pages[:place].count(page), last_use(page, pages, place)))


def belady(held: list[Page], pages: list[Page], place: int) -> Page:
    return max(held, key=lambda page: pages.index(page, place) if page in pages[place:] else len(pages))


@settings(max_examples=80, deadline=None)
@given(lines, st.integers(1, 24))
def test_replay_equals_a_naive_simulation(lines: JsonLines, slots: int) -> None:
    result = replay(trace_of(lines), slots)
    n = sum(len(experts) for _, experts in lines)
    assert result.requests == n
    assert result.lru == naive(lines, slots, lru) / n
    assert result.lfu == naive(lines, slots, lfu) / n
    assert result.belady == naive(lines, slots, belady) / n
    assert result.belady >= max(result.lru, result.lfu, result.ours)


class Counting(Adaptive):
    """Ours, and the most pages it was ever told to hold."""

    most = n_now = 0

    def admit(self, page: Page) -> None:
        self.n_now += 1
        self.most = max(self.most, self.n_now)
        super().admit(page)

    def drop(self, page: Page) -> None:
        self.n_now -= 1
        super().drop(page)


@settings(max_examples=40, deadline=None)
@given(lines, st.integers(1, 24))
def test_never_more_pages_than_slots_and_the_same_every_time(lines: JsonLines, slots: int) -> None:
    policies = [Counting(RouterStats(range(4), 8)) for _ in range(2)]
    hits = [play(policy, lines, slots) for policy in policies]
    assert hits[0] == hits[1]
    assert policies[0].most <= slots


def test_everything_fits() -> None:
    lines = [(layer, [0, 1]) for _ in range(5) for layer in range(3)]
    result = replay(trace_of(lines), 100)
    assert result.ours == result.lru == result.belady == 0.8
    assert result.gap_closed is None


def test_ours_beats_lru_where_lru_finds_nothing() -> None:
    """A cache under one token cycle: LRU drops every page just before it comes round again."""
    lines = [(layer, [0, 1 + (token * 5 + layer) % 7]) for token in range(60) for layer in range(8)]
    result = replay(trace_of(lines), 12)
    assert result.lru == 0
    assert result.ours > 0.35


def test_memory_of_tokens_goes_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmimo.experts.policy.similar_tokens.N_TOKENS", 80)
    rng = np.random.default_rng(4)
    patterns = [[sorted(rng.choice(32, 4, replace=False).tolist()) for _ in range(5)] for _ in range(12)]
    order = rng.integers(0, 12, 200)
    lines = [(layer, patterns[number][layer]) for number in order for layer in range(5)]
    result = replay(trace_of(lines), 40)
    assert result.ours > result.lru + 0.05


# ---- the file ----


def test_a_trace_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as writer:
        writer.write(0, 1, [3, 17])
        writer.write(0, 2, [0])
        writer.write(1, 1, np.array([5, 6]))
    assert path.read_text().splitlines()[0] == '{"step": 0, "layer": 1, "experts": [3, 17]}'
    trace = read_trace(path)
    assert list(trace) == [(1, [3, 17]), (2, [0]), (1, [5, 6])]
    assert (trace.n_steps, trace.n_requests, trace.n_experts) == (2, 5, 18)
    assert trace.pages(18).tolist() == [21, 35, 36, 23, 24]


GOOD = '{"step": 3, "layer": 1, "experts": [3, 17]}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "not JSON"),
        ("", "not JSON"),
        ("[" * 5000, "not JSON"),
        ("[1]", "not an object"),
        ('{"layer": 1, "experts": [1]}', '"step" must be'),
        ('{"step": 4, "experts": [1]}', '"layer" must be'),
        ('{"step": true, "layer": 1, "experts": [1]}', '"step" must be'),
        ('{"step": 4, "layer": -1, "experts": [1]}', '"layer" must be'),
        ('{"step": 4, "layer": 1e9, "experts": [1]}', '"layer" must be'),
        ('{"step": 4, "layer": 99999, "experts": [1]}', '"layer" must be'),
        ('{"step": 4, "layer": 1}', '"experts" must be a list'),
        ('{"step": 4, "layer": 1, "experts": []}', '"experts" must be a list'),
        ('{"step": 4, "layer": 1, "experts": [1, 2.5]}', '"experts" must be whole numbers'),
        ('{"step": 4, "layer": 1, "experts": [9999999999999999999]}', '"experts" must be whole numbers'),
        ('{"step": 4, "layer": 1, "experts": [2, 2]}', "names one twice"),
        ('{"step": 3, "layer": 1, "experts": [2]}', "step 3, layer 1 comes after step 3, layer 1"),
        ('{"step": 2, "layer": 7, "experts": [2]}', "step 2, layer 7 comes after step 3, layer 1"),
        ('{"step": 4, "layer": 1, "experts": [' + "1, " * 40000 + "1]}", "longer than"),
        ("\xff\x00", "not JSON"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD.encode() + line.encode("latin-1") + b"\n" + GOOD.encode())
    with pytest.raises(BadRequest) as refusal:
        read_trace(path)
    assert str(refusal.value).startswith(f"{path}, line 2: ") and says in str(refusal.value)


def test_an_empty_trace_and_one_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("")
    with pytest.raises(BadRequest, match="is empty"):
        read_trace(path)
    monkeypatch.setattr(trace_room, "MAX_REQUESTS", 3)
    path.write_text("".join(json.dumps({"step": i, "layer": 0, "experts": [1, 2]}) + "\n" for i in range(2)))
    with pytest.raises(BadRequest, match="line 2: the trace has more than 3 requests"):
        read_trace(path)


def test_a_trace_of_a_model_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(
        BadRequest, match="900 layers of 4,096 experts; the replay has room for 262,144 experts"
    ):
        replay(trace_of([(layer, [4095]) for layer in range(900)]), 10)
