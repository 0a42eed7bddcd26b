"""Sampling: logits of one position -> one token. Knows no text, no model and no session.

A draw is a function of the logits, the seed and the position alone: the noise of every token is hashed from them
(Gumbel's trick: the largest of log-probability plus noise is a draw from the distribution). So draws do not depend on
what was drawn before, on what runs at the same time, or on whether a token was drafted and is drawn twice.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from localmimo.decode.options import Sampling
from localmimo.errors import BadRequest

FIRST_SORTED = 256  # tokens that are sorted at first; nearly always they hold top-p


def _demand(holds: bool, sentence: str) -> None:
    if not holds:
        raise BadRequest(sentence)


def pick(logits: Tensor, sampling: Sampling, seen: Sequence[int], seed: int, position: int) -> int:
    """Draw the token at `position` from logits float32 [vocab]; `seen` are the tokens that penalties count."""
    logits = penalise(logits, sampling, seen)
    if sampling.greedy:
        return int(logits.argmax())
    tokens, scores = candidates(logits, sampling)
    return int(tokens[(scores.double() + gumbel(seed, position, tokens)).argmax()])


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise float64 [n] of tokens int64 [n], hashed from seed, position and token (splitmix64)."""
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.array([seed & (2**64 - 1)], np.uint64)) + np.uint64(position))
        bits = _mix(tokens.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(-np.log(-np.log(uniform)))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit of the input moves half of the output's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def penalise(logits: Tensor, sampling: Sampling, seen: Sequence[int]) -> Tensor:
    """Logits after bias, bans and penalties; the input is left as it is."""
    penalties = sampling.counts_tokens and seen
    if not sampling.logit_bias and not sampling.bans and not penalties:
        return logits
    logits = logits.clone()
    if penalties:
        _penalise_seen(logits, sampling, torch.tensor(seen))
    for token, bias in [*sampling.logit_bias.items(), *((token, float("-inf")) for token in sampling.bans)]:
        _demand(
            0 <= token < len(logits), f"logit bias names token {token}; the vocabulary has {len(logits)}."
        )
        logits[token] += bias
    return logits


def _penalise_seen(logits: Tensor, sampling: Sampling, seen: Tensor) -> None:
    tokens, counts = seen.unique(return_counts=True)
    picked = logits[tokens]
    strength = sampling.repetition_penalty
    picked = torch.where(picked > 0, picked / strength, picked * strength)
    logits[tokens] = picked - sampling.presence_penalty - sampling.frequency_penalty * counts


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens int64 [n] that temperature, top-k, top-p and min-p leave, in that order, and their logits [n]."""
    scaled = logits / sampling.temperature
    n = len(scaled)
    if 0 < sampling.top_k < n:
        values, tokens = scaled.topk(sampling.top_k)
        return _leading(values, tokens, values.logsumexp(-1), sampling)
    if sampling.top_p == 1 and sampling.min_p == 0:
        return torch.arange(n), scaled
    total, first = scaled.logsumexp(-1), min(FIRST_SORTED, n)
    while True:
        values, tokens = scaled.topk(first)
        kept, scores = _leading(values, tokens, total, sampling)
        if len(kept) < first or first == n:
            return kept, scores
        first = min(16 * first, n)


def _leading(values: Tensor, tokens: Tensor, total: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The leading tokens of a descending list that top-p and min-p keep; total: log of the sum over all."""
    probabilities = (values - total).exp()
    keep = (probabilities > 0) & (probabilities >= sampling.min_p * probabilities[0])
    if sampling.top_p < 1:
        keep &= (
            probabilities.cumsum(-1) - probabilities < sampling.top_p
        )  # the token that crosses top-p stays
    n = max(1, int(keep.sum()))
    return tokens[:n], values[:n]


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities float32 [vocab] after temperature, top-k, top-p and min-p: the plain reference of `candidates`."""
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
