"""Synthetic routing, as lines of a trace: pure numbers from a seed, for benchmarks.policy.

`language` is the nearest to a model: experts are chosen by linear routers from a state made of a topic that drifts, the
present token (Zipf over a vocabulary, half of them following their predecessor), a slow walk and noise. Its parameters
were set until hit rates of LRU, LFU and Belady were those of published traces of large models (docs/lab-notes.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localmimo.experts.policy.trace import Trace

Vector = NDArray[np.float64]
Choice = NDArray[np.int64]  # experts [tokens, layers, k]


@dataclass(frozen=True, slots=True)
class Shape:
    n_layers: int = 16
    n_experts: int = 64
    top_k: int = 4
    n_tokens: int = 160


def trace_of(choice: Choice) -> Trace:
    trace = Trace(n_steps=len(choice))
    for token in choice:
        for layer, experts in enumerate(token):
            trace.add(layer, np.unique(experts).tolist())
    return trace


def zipf(seed: int, shape: Shape, skew: float, drift: int = 0) -> Choice:
    """Experts drawn by Zipf ranks, a permutation per layer; a third of the ranks change hands every `drift` tokens."""
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(shape.n_experts) for _ in range(shape.n_layers)])
    choice = []
    for token in range(shape.n_tokens):
        if drift and token % drift == drift - 1:
            for row in ranks:
                moved = rng.permutation(shape.n_experts)[: shape.n_experts // 3]
                row[moved] = row[np.roll(moved, 1)]
        keys = -skew * np.log1p(ranks) + rng.gumbel(size=ranks.shape)
        choice.append(np.argsort(-keys, axis=1)[:, : shape.top_k])
    return np.stack(choice)


def periodic(seed: int, shape: Shape, period: int, noise: float) -> Choice:
    """The same tokens again and again, a part of the layers at random."""
    choice = zipf(seed, shape, 0.0)
    again = choice[:period][np.arange(shape.n_tokens) % period]
    stray = np.random.default_rng(seed + 1).random(choice.shape[:2]) < noise
    return np.where(stray[:, :, None], choice, again)


def scans(seed: int, shape: Shape, every: int, length: int) -> Choice:
    """Zipf routing, interrupted by tokens that walk through all experts once."""
    choice = zipf(seed, shape, 1.0)
    for token in range(shape.n_tokens):
        if token % every >= every - length:
            choice[token] = (token % every * shape.top_k + np.arange(shape.top_k)) % shape.n_experts
    return choice


def fickle(seed: int, shape: Shape, stay: float, every: int) -> Choice:
    """Nearly the same experts from token to token, and altogether others every so many tokens: made against ours."""
    rng = np.random.default_rng(seed)
    choice = zipf(seed, shape, 0.0)
    for token in range(shape.n_tokens):
        if token % every:
            keep = rng.random(choice.shape[1:]) < stay
            choice[token] = np.where(keep, choice[token - 1], choice[token])
    return choice


def alternating(seed: int, shape: Shape, turn: int) -> Choice:
    """Two conversations with nothing in common, `turn` tokens each."""
    one, other = zipf(seed, shape, 1.2), zipf(seed + 1, shape, 1.2)
    return np.where((np.arange(shape.n_tokens) // turn % 2 == 0)[:, None, None], one, other)


@dataclass(frozen=True, slots=True)
class Language:
    """Weights of what a router sees, and how the text behaves."""

    topic: float = 0.8
    token: float = 1.4
    walk: float = 0.7
    noise: float = 0.6
    skew: float = 0.3  # of the experts' biases
    topic_tokens: int = 30
    n_topics: int = 6
    vocabulary: int = 1500


def language(seed: int, shape: Shape, text: Language) -> Choice:
    rng = np.random.default_rng(seed)
    width = 48
    routers = rng.standard_normal((shape.n_layers, shape.n_experts, width)) / np.sqrt(width)
    biases = text.skew * rng.standard_normal((shape.n_layers, shape.n_experts))
    depth = np.linspace(0, 1, shape.n_layers)[:, None]  # early layers see the token, late ones the context
    choice = []
    for topic, token, walk in _states(rng, shape.n_tokens, text, width):
        noise = text.noise * rng.standard_normal(width)
        seen = (
            (0.5 + depth) * (text.topic * topic + text.walk * walk)
            + (1.5 - depth) * text.token * token
            + noise
        )
        scores = np.einsum("lew,lw->le", routers, seen) + biases
        scores += 0.3 * text.noise * rng.standard_normal(scores.shape)
        choice.append(np.argsort(-scores, axis=1)[:, : shape.top_k])
    return np.stack(choice)


def _states(
    rng: np.random.Generator, n_tokens: int, text: Language, width: int
) -> Iterator[tuple[Vector, Vector, Vector]]:
    """Topic, token and walk vectors, token by token."""
    topics = rng.standard_normal((text.n_topics, width))
    words = rng.standard_normal((text.vocabulary, width))
    orders = [rng.permutation(text.vocabulary) for _ in topics]
    followers = rng.integers(0, text.vocabulary, (text.vocabulary, 4))
    common = 1 / np.arange(1, text.vocabulary + 1) ** 1.2
    common /= common.sum()
    number, word, topic, walk = 0, 0, topics[0].copy(), rng.standard_normal(width)
    for _ in range(n_tokens):
        if rng.random() < 1 / text.topic_tokens:
            number = int(rng.integers(text.n_topics))
        follows = rng.random() < 0.5
        word = int(
            followers[word, rng.integers(4)] if follows else orders[number][rng.choice(len(common), p=common)]
        )
        topic = 0.9 * topic + 0.1 * topics[number]
        walk = 0.8 * walk + 0.6 * rng.standard_normal(width)
        yield topic, words[word], walk
