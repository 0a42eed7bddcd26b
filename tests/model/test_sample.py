"""Sampling: each knob keeps what it says, and frequencies follow the probabilities."""

import pytest
import torch

from localmimo.errors import BadRequest
from localmimo.sample import Sampling, distribution, logprobs, penalise, pick

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


def test_temperature() -> None:
    cold = distribution(LOGITS, Sampling(temperature=0.5, top_p=1.0))
    assert torch.allclose(cold, torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365)
    assert pick(LOGITS, Sampling(temperature=0), [], torch.Generator()) == 0


def test_frequencies_follow_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = (
        torch.tensor([pick(LOGITS, PLAIN, [], generator) for _ in range(4000)]).bincount(minlength=4) / 4000
    )
    assert (drawn - LOGITS.exp()).abs().max() < 0.03


def test_a_seed_repeats() -> None:
    draws = [[pick(LOGITS, PLAIN, [], torch.Generator().manual_seed(7)) for _ in range(5)] for _ in range(2)]
    assert draws[0] == draws[1]


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
