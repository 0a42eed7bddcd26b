"""Drafts change no token: what is drawn is what would have been drawn, whatever is proposed. And they cost little."""

import random
import threading
from collections.abc import Callable

import pytest
import torch

from localmimo import BadRequest, DoesNotFit, Sampling, load
from localmimo.decode.draft_depth import DepthPolicy, Draft, FixedDepth, MeasuredDepth
from localmimo.decode.generation import Generation
from localmimo.decode.sampler import candidates, pick
from localmimo.decode.speculative import SpeculativeSteps
from localmimo.decode.steps import DraftStats
from localmimo.engine import Engine
from localmimo.experts.store.counters import PageCounters
from tests.decode.drafts import drafting, prophecy

pytestmark = pytest.mark.engine("nf4_pack", context=120, draft=3)

GREEDY = Sampling(temperature=0)
N = 24


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.2, top_p=0.9, seed=5, presence_penalty=0.3)]
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_same_tokens_with_drafts_and_without(engine: Engine, sampling: Sampling, depth: int) -> None:
    plain = engine.generate("Hello", max_tokens=N, sampling=sampling)
    for right in (0.0, 0.7, 1.0):
        with drafting(engine, depth), prophecy(plain.tokens, 5, right, seed=depth):
            ahead = engine.generate("Hello", max_tokens=N, sampling=sampling)
        assert ahead.tokens == plain.tokens and ahead.text == plain.text
        assert ahead.finish_reason == plain.finish_reason
        drafts = ahead.stats.drafts
        if right == 1.0:
            assert drafts.accepted == drafts.drafted and drafts.passes == pytest.approx(
                N / (depth + 1), abs=1
            )
        if right == 0.0:
            assert drafts.acceptance[0] < 0.2


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_checkpoints_own_heads(engine: Engine, depth: int) -> None:
    """Random heads foresee nothing, but they run: through prompts, steps and what is taken back."""
    plain = engine.generate("Hello", max_tokens=N, sampling=GREEDY)
    with drafting(engine, depth):
        ahead = engine.generate("Hello", max_tokens=N, sampling=GREEDY)
    assert ahead.tokens == plain.tokens
    assert ahead.stats.drafts.drafted[:depth] != [0] * depth


def test_draws_follow_the_distribution_with_drafts(engine: Engine) -> None:
    """Over many seeds, the first three tokens after a pass with drafts are drawn as their distributions say."""
    sampling = Sampling(temperature=0.8, top_p=0.9)
    n, n_passes = 1500, 120
    with engine.session() as session:
        after = session.sync(engine.encode("abc"))
        first, second = [], []
        for seed in range(n):
            ahead = SpeculativeSteps(session, FixedDepth(2), DraftStats(), lambda: 0)
            a = pick(after, sampling, [], seed, 3)

            def choose(logits: torch.Tensor, drafts: list[int], seed: int = seed) -> int:
                return pick(logits, sampling, [], seed, 4 + len(drafts))

            first.append(a)
            if seed < n_passes:  # a pass of the model each
                logits = ahead.advance(97, 2, choose)
                second.append(pick(logits, sampling, [], seed, 4))
                ahead.settle()
                session.rewind(1)
        expected_after = session.step(97)
    for draws, logits in ((first, after), (second, expected_after)):
        tokens, scores = candidates(logits, sampling)
        expected = torch.zeros(len(logits)).scatter_(0, tokens, scores.softmax(-1)) * len(draws)
        found = torch.tensor(draws).bincount(minlength=len(logits))
        assert found[expected == 0].sum() == 0
        kept = expected > 0
        chi2 = ((found[kept] - expected[kept]).square() / expected[kept]).sum()
        freedom = int(kept.sum()) - 1
        assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 5


class ToldSession:
    """A session that drafts what it is told; the logits after a token are its number."""

    context, n_heads = 100, 3

    def __init__(self, *drafts: int) -> None:
        self.tokens, self.drafts = [1, 2], list(drafts)

    @property
    def position(self) -> int:
        return len(self.tokens)

    def draft(self, token: int, n: int, choose: object) -> list[int]:
        return self.drafts[:n]

    def extend(self, tokens: list[int], check: object) -> torch.Tensor:
        self.tokens += tokens
        return torch.tensor(tokens, dtype=torch.float32)[:, None]

    def rewind(self, n: int) -> None:
        del self.tokens[-n:]


class Noted(FixedDepth):
    """A fixed depth that notes the depth and the tokens of each pass."""

    def record_pass(self, depth: int, seconds: float, tokens: int) -> None:
        passes.append((depth, tokens))


passes: list[tuple[int, int]] = []


@pytest.mark.parametrize("n_right", [0, 1, 2, 3])
def test_each_draft_that_was_drawn_is_counted_for_its_head(n_right: int) -> None:
    passes.clear()
    session, stats = ToldSession(7, 8, 9), DraftStats()
    ahead = SpeculativeSteps(session, Noted(3), stats, lambda: 10 * len(passes))  # type: ignore[arg-type]
    drawn = [5, *[7, 8, 9][:n_right], 4]
    for token in drawn:
        logits = ahead.advance(token, 3, lambda logits, drafts: 0)
        assert logits.tolist() == [token]
    assert stats.accepted == [1] * n_right + [0] * (3 - n_right)
    assert stats.drafted == [2, 2, 2] and stats.passes == stats.passes_at[3] == 2
    assert passes == [(3, 1 + n_right)]
    ahead.settle()
    assert session.tokens == [1, 2, *drawn] and passes[1:] == [(3, 1)]


def test_pages_on_the_gpu_count_for_drafts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What drafting asks for is asked for wherever the pages are."""
    monkeypatch.setattr(
        type(engine._store), "counters", property(lambda store: PageCounters(gpu_pages=5 * len(asked)))
    )
    asked: list[int] = []
    engine.record(lambda layer, chosen: asked.append(layer))
    done = engine.generate("Hello", max_tokens=4, sampling=GREEDY)
    engine.record(None)
    assert done.stats.pages_gpu > 0
    n_moe = len(engine.config.moe_layers)
    assert sum(done.stats.drafts.pages) == 5 * n_moe * done.stats.drafts.passes


def test_the_session_holds_what_was_said_however_it_ends(engine: Engine) -> None:
    whole = engine.generate("Hello", max_tokens=N, sampling=GREEDY)
    prompt = engine.encode("Hello")
    for n in range(1, 9):
        with drafting(engine, 3), prophecy(whole.tokens, 5, 1.0, seed=n):
            engine.generate("Hello", max_tokens=n, sampling=GREEDY)
        with engine.session() as session:
            assert session.tokens == [*prompt, *whole.tokens[: n - 1]]
    stop = whole.text[3:5]
    with drafting(engine, 3), prophecy(whole.tokens, 5, 1.0, seed=0):
        cut = engine.generate("Hello", max_tokens=N, sampling=GREEDY, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    with engine.session() as session:
        assert session.tokens == [*prompt, *cut.tokens][: session.position]
        assert session.position == len(prompt) + len(cut.tokens) - 1


@pytest.mark.parametrize("call", range(1, 40, 6))
def test_a_cancel_between_any_layers_leaves_whole_tokens(engine: Engine, call: int) -> None:
    whole = engine.generate("Hello", max_tokens=N, sampling=GREEDY)
    cancel, calls = threading.Event(), 0
    real = Generation.check

    def check(self: Generation) -> None:
        nonlocal calls
        calls += 1
        if calls == 6 + call:  # after the prompt's layers
            threading.Thread(target=cancel.set).start()
            cancel.wait()
        real(self)

    Generation.check = check  # type: ignore[method-assign]
    try:
        with drafting(engine, 3), prophecy(whole.tokens, 5, 0.7, seed=call):
            steps = list(engine.stream("Hello", max_tokens=N, sampling=GREEDY, cancel=cancel))
    finally:
        Generation.check = real  # type: ignore[method-assign]
    assert calls == 6 + call, "the cancel was heard at once: no further layer ran"
    assert steps[-1].finish_reason == "cancelled"
    said = [step.token for step in steps if step.token is not None]
    assert said == whole.tokens[: len(said)]
    with engine.session() as session:
        assert session.tokens == [*engine.encode("Hello"), *said][: session.position]
        assert session.position >= 5 + len(said) - 1 or not said


def test_a_context_is_filled_to_its_end(engine: Engine) -> None:
    plain = engine.generate("a" * 100, sampling=GREEDY)
    with drafting(engine, 3), prophecy(plain.tokens, 100, 0.9, seed=1):
        ahead = engine.generate("a" * 100, sampling=GREEDY)
    assert ahead.tokens == plain.tokens and ahead.finish_reason == plain.finish_reason


def test_settings(engine: Engine) -> None:
    for draft in (4, -1, "some", 1.5):
        with pytest.raises(BadRequest, match="auto or a number of tokens from 0 to 3"):
            load(engine.pack.path, context=64, draft=draft)  # type: ignore[arg-type]
    asked: Draft = 2
    with load(engine.pack.path, context=64, draft=asked) as two:
        assert two.effective()["draft"] == {"setting": 2, "heads": 2}
    with load(engine.pack.path, context=64, draft=0) as none:
        least = none.plan.used_bytes - none.plan.slots_bytes + 8 * none.plan.page_bytes
        tight = least + 4096
        with load(engine.pack.path, context=64, ram=tight) as auto:
            assert auto.effective()["draft"] == {"setting": "auto", "heads": 0}  # they have no room
        with pytest.raises(DoesNotFit):
            load(engine.pack.path, context=64, ram=tight, draft=3)


# ---- the pace, on a simulated machine ----


class SimulatedMachine:
    """Passes take cost(depth), noisily; the machine may stall, and may change its speed every now and then."""

    def __init__(
        self,
        cost: Callable[[int], float],
        right: tuple[float, float, float],
        seed: int,
        *,
        noise: float = 0.25,
        stalls: float = 0.0,
        drift: float = 0.0,
    ) -> None:
        """right: each head's chance; stalls: a pass's chance; drift: tokens that a speed lasts, in the mean."""
        self.cost, self.right, self.noise, self.stalls, self.drift = cost, right, noise, stalls, drift
        self.rng, self.weather = random.Random(seed), random.Random(seed + 10_000)
        self.seconds, self._slow, self._until = 0.0, 1.0, 0.0

    def run(self, pace: DepthPolicy, tokens: int) -> list[int]:
        """Say so many tokens; the depths."""
        said, depths = 0, []
        while said < tokens:
            depth = pace.depth()
            given = 1 + next((k for k in range(depth) if self.rng.random() >= self.right[k]), depth)
            took = self._slowness(said) * self.cost(depth)
            took *= self.rng.lognormvariate(-(self.noise**2) / 2, self.noise)
            took *= 6 if self.rng.random() < self.stalls else 1
            pace.record_pass(depth, took, given)
            self.seconds, said = self.seconds + took, said + given
            depths.append(depth)
        return depths

    def _slowness(self, said: int) -> float:
        while self.drift and said >= self._until:
            self._until += self.weather.expovariate(1 / self.drift)
            self._slow = self.weather.choice((1.0, 1.3, 2.0, 3.0))
        return self._slow


def simulate(
    cost: Callable[[int], float],
    right: tuple[float, float, float],
    tokens: int,
    seed: int,
    stalls: float = 0.0,
) -> tuple[float, list[int]]:
    """Seconds to say so many tokens, and the depths."""
    machine = SimulatedMachine(cost, right, seed, stalls=stalls)
    depths = machine.run(MeasuredDepth(3), tokens)
    return machine.seconds, depths


def speed(cost: Callable[[int], float], right: tuple[float, float, float], **machine: float) -> float:
    """Of `auto` over that without drafts: 256 tokens, 100 machines."""
    seconds = {0: 0.0, 1: 0.0}
    for seed in range(100):
        for adaptive in seconds:
            here = SimulatedMachine(cost, right, seed, **machine)
            here.run(MeasuredDepth(3) if adaptive else FixedDepth(0), 256)
            seconds[adaptive] += here.seconds
    return seconds[0] / seconds[1]


UNSTEADY = pytest.mark.parametrize(
    "machine",
    [
        {"noise": 0.1},
        {"noise": 0.25},
        {"noise": 0.05, "drift": 30.0},
        {"noise": 0.25, "drift": 60.0, "stalls": 0.03},
    ],
    ids=["quiet", "noisy", "drifting", "all of it"],
)


@UNSTEADY
def test_most_of_a_small_gain_is_found_on_any_machine(machine: dict[str, float]) -> None:
    """Drafts that pay 1.2 times at the best depth, on a machine that may change its speed from second to second."""
    assert speed(lambda depth: 1 + 0.617 * depth, (0.94, 0.79, 0.78), **machine) >= 1.12


@UNSTEADY
@pytest.mark.parametrize(
    "costs", [(0.9, 0.9, 0.7, 0.6), (1.0, 0.5, 0.3, 0.2), (0.95, 0.0, 0.0, 0.0), (0.3, 0.1, 0.1, 0.1)]
)
def test_where_drafts_do_not_pay_nobody_notices(costs: tuple[float, ...], machine: dict[str, float]) -> None:
    step, *right = costs
    assert speed(lambda depth: 1 + step * depth, tuple(right), **machine) > 0.98


def test_where_drafts_pay_they_are_used() -> None:
    """Three drafts cost a third more, two of three are right: 2.2 times as fast at the best."""
    runs = [simulate(lambda depth: 1 + 0.11 * depth, (0.95, 0.75, 0.7), 2000, seed) for seed in range(9)]
    assert all(seconds < 2000 / 1.8 for seconds, _ in runs)
    deepest = sorted(sum(depth == 3 for depth in depths) / len(depths) for _, depths in runs)
    assert deepest[len(deepest) // 2] > 0.8


def test_a_machine_that_stalls_does_not_hide_that_they_pay() -> None:
    runs = [simulate(lambda d: 1 + 0.11 * d, (0.95, 0.75, 0.7), 1000, seed, stalls=0.2) for seed in range(20)]
    used = [sum(depth > 0 for depth in depths) / len(depths) for _, depths in runs]
    assert sorted(used)[len(used) // 2] > 0.85 and sorted(used)[len(used) // 10] > 0.5


def test_the_pace_follows_when_the_machine_changes() -> None:
    """A cold start makes passes without drafts look slow; they are looked at again."""
    rng, pace, depths = random.Random(2), MeasuredDepth(3), []
    for n in range(400):
        depth = pace.depth()
        base = 3.0 if n < 12 else 1.0
        accepted = next((k for k in range(depth) if rng.random() >= 0.4), depth)
        pace.record_pass(depth, base * (1 + 0.8 * depth) * rng.lognormvariate(0, 0.1), accepted + 1)
        depths.append(depth)
    assert sum(depth > 0 for depth in depths[60:]) < 0.15 * len(depths[60:])
