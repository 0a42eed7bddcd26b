"""Similar tokens: past tokens whose routing resembles the present one's, and what they and the tokens after them used.

Text repeats itself, and so does its routing: once some layers of a token are known, tokens like it say what its other
layers and the next tokens will use. Knows rows and experts as numbers; no slots, no pages held.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

N_TOKENS = 512  # remembered
SHARPNESS = (8.0, 20.0)  # how much more a token counts that shares one part in one of the present uses
BEFORE = 0.5  # weight of the likeness of the tokens before
N_NEXT, N_LATER = 32, 64  # tokens that have a say
_WIDEST = 64  # experts remembered of a request

Array = NDArray[np.float32]


class SimilarTokens:
    """The last N_TOKENS tokens' uses of `n_rows` layers of `n_experts`."""

    def __init__(self, n_rows: int, n_experts: int) -> None:
        self._shape = (n_rows, n_experts)
        self._used = np.zeros((n_rows, n_experts, N_TOKENS), dtype=np.uint8)
        self._places = np.full(
            (N_TOKENS, n_rows, 1), n_rows * n_experts, dtype=np.intp
        )  # row * n_experts + expert
        self._now = 0  # slot of the present token; slots go round
        self.n_past = 0  # tokens remembered before the present one
        self._shared = np.zeros(
            N_TOKENS, dtype=np.float32
        )  # uses that each has in common with the present token
        self._n_uses = 0  # of the present token so far
        self._shared_before = np.zeros(N_TOKENS, dtype=np.float32)  # the same of the token before, as a share
        self._done = 0  # rows of the present token that are known
        self._alike = np.zeros(
            (len(SHARPNESS), N_TOKENS), dtype=np.float32
        )  # weights of the past tokens, sum 1

    def next_token(self) -> None:
        """The present token is past; another begins."""
        self._shared_before = np.roll(self._shared, 1) / np.float32(max(self._n_uses, 1))
        self._alike = np.roll(self._alike, 1, axis=1)  # what was alike is now followed by what is expected
        self.n_past = min(self.n_past + 1, N_TOKENS - 1)
        self._now = (self._now + 1) % N_TOKENS
        self._used[:, :, self._now] = 0
        self._places[self._now] = self._nowhere
        self._alike[:, self._now] = 0
        self._shared = np.zeros_like(self._shared)
        self._n_uses = self._done = 0

    @property
    def _nowhere(self) -> int:
        return self._shape[0] * self._shape[1]

    def who(self, rows: NDArray[np.intp], experts: NDArray[np.intp]) -> Array:
        """Which remembered tokens used each of these pages [pages, N_TOKENS]."""
        return self._used[rows, experts].astype(np.float32)

    def said(self, who: Array) -> Array:
        """What each sharpness would have given for pages of the present token, before they are learnt."""
        return self._alike @ who.T

    def learn(self, row: int, experts: Sequence[int]) -> None:
        """The present token uses these experts of a row."""
        experts = list(experts)[:_WIDEST]
        if len(experts) > self._places.shape[2]:
            wider = np.full((*self._places.shape[:2], len(experts)), self._nowhere, dtype=np.intp)
            wider[:, :, : self._places.shape[2]] = self._places
            self._places = wider
        self._used[row, experts, self._now] = 1
        self._places[self._now, row, : len(experts)] = experts
        self._places[self._now, row, : len(experts)] += row * self._shape[1]
        self._n_uses += len(experts)
        self._done = row + 1

    def compare(self, who: Array) -> None:
        """Weigh the past tokens again, after the present one was found to use pages that `who` of them used."""
        self._shared += who.sum(0)
        likeness = self._shared / max(self._n_uses, 1) + BEFORE * self._shared_before
        past = self._past()
        for weights, sharpness in zip(self._alike, SHARPNESS, strict=True):
            weights[:] = 0
            if len(past):
                grown = np.exp(sharpness * (likeness[past] - likeness[past].max()))
                weights[past] = grown / grown.sum()

    def _past(self) -> NDArray[np.intp]:
        """Slots of the past tokens, oldest first."""
        return np.arange(self._now - self.n_past, self._now) % N_TOKENS

    def next_uses(self, mix: Array) -> Array:
        """Chance that each page is used at its row's next turn [rows, experts]; mix: weight of each sharpness.

        Of rows still to come in this token what its likes used, of the others what the tokens after those used.
        """
        slots, weights = _heaviest(mix @ self._alike, N_NEXT)
        after = (slots + 1) % N_TOKENS
        places = np.concatenate(
            (self._places[after, : self._done], self._places[slots, self._done :]), axis=1
        )
        return self._count(places, weights)

    def later_weights(self, reach: float) -> Array:
        """Weights of the tokens two and more places after each like token [sharpness, N_TOKENS], over about `reach`."""
        return np.stack([self._spread(alike, reach) for alike in self._alike])

    def _spread(self, alike: Array, reach: float) -> Array:
        """Pass the weights of tokens on to those two and more places after them; the sum stays."""
        slots = np.arange(self._now - self.n_past, self._now + 1) % N_TOKENS
        later = np.zeros_like(alike)
        if len(slots) > 2:
            kernel = np.exp(-np.arange(min(int(3 * reach) + 1, 48), dtype=np.float32) / np.float32(reach))
            spread = np.convolve(alike[slots], kernel)[: len(slots) - 2]
            later[slots[2:]] = spread * (alike.sum() / max(spread.sum(), 1e-12))
        return later

    def later_uses(self, mix: Array, reach: float) -> Array:
        """Chance per token that each page is used after its next turn [rows, experts]."""
        slots, weights = _heaviest(self._spread(mix @ self._alike, reach), N_LATER)
        return self._count(self._places[slots], weights)

    def _count(self, places: NDArray[np.intp], weights: Array) -> Array:
        heavy = np.repeat(weights, places.shape[1] * places.shape[2])
        counted = np.bincount(places.reshape(-1), heavy, minlength=self._nowhere + 1)[:-1]
        return counted.astype(np.float32).reshape(self._shape)


def _heaviest(weights: Array, n: int) -> tuple[NDArray[np.intp], Array]:
    """The n largest weights and where they are; their sum is made that of all."""
    slots = np.argpartition(weights, -n)[-n:]
    chosen = weights[slots]
    return slots, chosen * (weights.sum() / max(chosen.sum(), 1e-12))
