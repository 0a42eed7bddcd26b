"""Sampling: each knob keeps what it says, and frequencies follow the probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmimo.decode.options import Sampling
from localmimo.decode.sampler import candidates, distribution, gumbel, logprobs, penalise, pick
from localmimo.errors import BadRequest

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
PLAIN = Sampling(temperature=1.0, top_p=1.0)


def kept(**knobs: float) -> list[int]:
    return (
        distribution(LOGITS, Sampling(**({"temperature": 1.0, "top_p": 1.0} | knobs)))
        .nonzero()
        .flatten()
        .tolist()
    )


def test_knobs() -> None:
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.79) == [0, 1]
    assert kept(top_p=0.81) == [0, 1, 2]
    assert kept(min_p=0.2) == [0, 1, 2]
    assert kept(top_k=9) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("knobs", "tokens"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.3}, [0]),  # the first token crosses, and stays
        ({"top_p": 0.79}, [0, 1]),
        ({"top_p": 0.81}, [0, 1, 2]),
        ({"top_p": 0.9501}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [0]),  # of what top-k left, the first has 0.625
        ({"top_k": 2, "top_p": 0.63}, [0, 1]),
        ({"min_p": 0.29}, [0, 1, 2]),
        ({"min_p": 0.31}, [0, 1]),
        ({"min_p": 1.0}, [0]),
    ],
)
def test_what_is_drawn_from(knobs: dict[str, float], tokens: list[int]) -> None:
    """`candidates`, which `pick` draws from; the token that crosses top-p is one of them."""
    sampling = Sampling(**({"temperature": 1.0, "top_p": 1.0} | knobs))
    assert candidates(LOGITS, sampling)[0].tolist() == tokens
    drawn = {pick(LOGITS, sampling, [], seed, 1) for seed in range(400)}
    assert drawn == set(tokens)


def test_top_k_keeps_k_tokens_of_equal_ones() -> None:
    level = torch.tensor([0.0, 1.0, 1.0, 1.0])
    for k in (1, 2, 3):
        tokens, _ = candidates(level, Sampling(temperature=1.0, top_p=1.0, top_k=k))
        assert len(tokens) == k and 0 not in tokens.tolist()


def test_a_token_that_was_seen_often_is_penalised_once_but_for_its_frequency() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    seen = [0, 0, 0, 1, 1]
    assert penalise(logits, Sampling(repetition_penalty=2.0), seen).tolist() == [1.0, -4.0, 1.0]
    assert penalise(logits, Sampling(presence_penalty=0.5), seen).tolist() == [1.5, -2.5, 1.0]
    assert penalise(logits, Sampling(frequency_penalty=0.5), seen).tolist() == [0.5, -3.0, 1.0]


def test_temperature() -> None:
    cold = distribution(LOGITS, Sampling(temperature=0.5, top_p=1.0))
    assert torch.allclose(cold, torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365)
    assert pick(LOGITS, Sampling(temperature=0), [], 0, 0) == 0


def test_frequencies_follow_the_probabilities() -> None:
    """Over positions and over seeds: both make the noise."""
    for draws in (
        [pick(LOGITS, PLAIN, [], 1, position) for position in range(4000)],
        [pick(LOGITS, PLAIN, [], seed, 1) for seed in range(4000)],
    ):
        share = torch.tensor(draws).bincount(minlength=4) / 4000
        assert (share - LOGITS.exp()).abs().max() < 0.025


def test_draws_of_neighbouring_positions_are_independent() -> None:
    draws = torch.tensor([pick(LOGITS, PLAIN, [], 3, position) for position in range(8000)])
    pairs = (4 * draws[:-1] + draws[1:]).bincount(minlength=16).view(4, 4) / 7999
    expected = LOGITS.exp()[:, None] * LOGITS.exp()
    assert (pairs - expected).abs().max() < 0.015


def test_noise_is_gumbel_noise() -> None:
    noise = gumbel(7, 11, torch.arange(200_000))
    assert noise.mean() == pytest.approx(0.57722, abs=0.01) and noise.var() == pytest.approx(
        1.64493, abs=0.03
    )
    others = [gumbel(8, 11, torch.arange(1000)), gumbel(7, 12, torch.arange(1000))]
    assert all(abs(float(torch.corrcoef(torch.stack((noise[:1000], o)))[0, 1])) < 0.1 for o in others)


def test_a_seed_and_a_position_repeat() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    draws = [[pick(logits, PLAIN, [], 7, position) for position in range(9)] for _ in range(2)]
    assert draws[0] == draws[1] != [pick(logits, PLAIN, [], 8, position) for position in range(9)]


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(2, 3000),
    spread=st.floats(0.1, 6),
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 0, 1, 7, 300]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.9]),
)
def test_candidates_are_those_of_the_plain_reference(
    n: int, spread: float, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * spread
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = distribution(logits, sampling)
    tokens, scores = candidates(logits, sampling)
    found = torch.zeros(n).scatter_(0, tokens, scores.softmax(-1))
    differing = (found - expected).abs().sum()
    edge = expected[expected > 0].min()  # sums are rounded differently: at most the last one kept differs
    assert differing <= 2 * max(float(edge), float(found[found > 0].min())) + 1e-4


def test_bans() -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, bans=(0, 2))
    assert {pick(LOGITS, sampling, [], 1, position) for position in range(200)} == {1, 3}
    with pytest.raises(BadRequest, match="vocabulary has 4"):
        pick(LOGITS, Sampling(bans=(4,)), [], 1, 0)


def test_penalties_and_bias_leave_the_input() -> None:
    before = LOGITS.clone()
    changed = penalise(
        LOGITS, Sampling(presence_penalty=1, frequency_penalty=0.5, logit_bias={3: 9.0}), [0, 0, 1]
    )
    assert torch.allclose(changed - LOGITS, torch.tensor([-2.0, -1.5, 0.0, 9.0]))
    assert torch.equal(LOGITS, before)
    repeated = penalise(torch.tensor([2.0, -2.0, 1.0]), Sampling(repetition_penalty=2.0), [0, 1])
    assert repeated.tolist() == [1.0, -4.0, 1.0]


def test_logprobs() -> None:
    logprob, top = logprobs(LOGITS, 2, 2)
    assert logprob == pytest.approx(torch.tensor(0.15).log().item(), abs=1e-5)
    assert [token for token, _ in top] == [0, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 2},
        {"min_p": -0.1},
        {"top_k": -3},
        {"repetition_penalty": 0},
    ],
)
def test_senseless_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(BadRequest):
        Sampling(**wrong)


def test_bias_of_an_unknown_token() -> None:
    with pytest.raises(BadRequest, match="9.*4"):
        penalise(LOGITS, Sampling(logit_bias={9: 1.0}), [])
