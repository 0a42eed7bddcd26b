"""Sampling: logits of one position -> one token. Knows no text, no model and no session."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localmimo.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn. Temperature 0 takes the likeliest; a seed makes draws repeatable."""

    temperature: float = 0.7
    top_k: int = 0  # 0 = all
    top_p: float = 0.95
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens seen before
    presence_penalty: float = 0.0  # taken off the logit of a token seen before
    frequency_penalty: float = 0.0  # taken off once for each time it was seen
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _demand(
            self.temperature >= 0, f"temperature {self.temperature} is negative; 0 takes the likeliest token."
        )
        _demand(self.top_k >= 0, f"top-k {self.top_k} is negative; 0 keeps every token.")
        _demand(0 < self.top_p <= 1, f"top-p {self.top_p} is not above 0 and at most 1.")
        _demand(0 <= self.min_p <= 1, f"min-p {self.min_p} is not between 0 and 1.")
        _demand(self.repetition_penalty > 0, f"repetition penalty {self.repetition_penalty} is not above 0.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _demand(holds: bool, sentence: str) -> None:
    if not holds:
        raise BadRequest(sentence)


def pick(logits: Tensor, sampling: Sampling, seen: Sequence[int], generator: torch.Generator) -> int:
    """Draw a token from logits float32 [vocab]; `seen` are the tokens that penalties count."""
    logits = penalise(logits, sampling, seen)
    if sampling.greedy:
        return int(logits.argmax())
    return int(torch.multinomial(distribution(logits, sampling), 1, generator=generator))


def penalise(logits: Tensor, sampling: Sampling, seen: Sequence[int]) -> Tensor:
    """Logits after bias and penalties; the input is left as it is."""
    penalties = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    if not sampling.logit_bias and not (penalties and seen):
        return logits
    logits = logits.clone()
    for token, bias in sampling.logit_bias.items():
        _demand(
            0 <= token < len(logits), f"logit bias names token {token}; the vocabulary has {len(logits)}."
        )
        logits[token] += bias
    if penalties and seen:
        _penalise_seen(logits, sampling, torch.tensor(seen))
    return logits


def _penalise_seen(logits: Tensor, sampling: Sampling, seen: Tensor) -> None:
    tokens, counts = seen.unique(return_counts=True)
    picked = logits[tokens]
    strength = sampling.repetition_penalty
    picked = torch.where(picked > 0, picked / strength, picked * strength)
    logits[tokens] = picked - sampling.presence_penalty - sampling.frequency_penalty * counts


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities float32 [vocab] after temperature, top-k, top-p and min-p, in that order."""
    values, tokens = (logits / sampling.temperature).sort(descending=True, stable=True)
    probabilities = values.softmax(-1)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if 0 < sampling.top_k < len(values):
        keep[sampling.top_k :] = False
        probabilities = (probabilities * keep) / (probabilities * keep).sum()
    keep &= probabilities.cumsum(-1) - probabilities < sampling.top_p  # the token that crosses top-p stays
    keep &= probabilities >= sampling.min_p * probabilities[0]
    kept = probabilities * keep
    return torch.zeros_like(kept).scatter_(0, tokens, kept / kept.sum())


def logprobs(logits: Tensor, token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of `token` under the unmodified logits, and the n_top likeliest tokens with theirs."""
    scores = logits.log_softmax(-1)
    values, tokens = scores.topk(n_top)
    return float(scores[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))
