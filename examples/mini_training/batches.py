"""Batches: rows of whole conversations, drawn from the token arrays of every kind in shares that change over
time.

Knows the arrays that mini_corpus.build writes; it must not know the model.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ID_BITS = 0x7FFF
OTHER_WEIGHT = 0.3  # loss weight of tokens that the assistant does not write


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens and documents [B, T + 3] (three more for the draft heads), weights of each as a target."""

    tokens: Tensor
    documents: Tensor
    weights: Tensor


class Kind:
    """One kind's conversations in an endless shuffled order."""

    def __init__(self, folder: Path, name: str, seed: int) -> None:
        self.tokens = np.load(folder / f"{name}.npy")
        self.starts = np.load(folder / f"{name}.starts.npy")
        self.seed, self.epoch, self.at = seed, 0, 0
        self._shuffle()

    def _shuffle(self) -> None:
        self.order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.starts) - 1)

    @property
    def mean_length(self) -> float:
        """Tokens per conversation."""
        return len(self.tokens) / (len(self.starts) - 1)

    def next(self) -> np.ndarray:
        """The next conversation's raw tokens."""
        if self.at == len(self.order):
            self.epoch, self.at = self.epoch + 1, 0
            self._shuffle()
        n = self.order[self.at]
        self.at += 1
        return self.tokens[self.starts[n] : self.starts[n + 1]]


class Mixer:
    """Draws batches; `position` is all that is needed to go on after a restart."""

    def __init__(
        self, folder: Path, shares: dict[str, tuple[float, float]], silent: tuple[int, int], seed: int
    ) -> None:
        self.kinds = {name: Kind(folder, name, seed * 100 + n) for n, name in enumerate(shares)}
        self.shares, self.silent = shares, silent
        self.rng = np.random.default_rng(seed)

    @property
    def position(self) -> dict[str, tuple[int, int]]:
        """Epoch and place of every kind."""
        return {name: (kind.epoch, kind.at) for name, kind in self.kinds.items()}

    def resume(self, position: dict[str, tuple[int, int]]) -> None:
        """Go to a saved position."""
        for name, (epoch, at) in position.items():
            if name in self.kinds:
                kind = self.kinds[name]
                kind.epoch = epoch
                kind._shuffle()
                kind.at = min(at, len(kind.order))

    def draw(self, rows: int, length: int, late: float) -> Batch:
        """`late` in [0, 1] moves from the early shares to the late ones."""
        names = list(self.kinds)
        weight = np.array(
            [
                (self.shares[n][0] * (1 - late) + self.shares[n][1] * late) / self.kinds[n].mean_length
                for n in names
            ]
        )
        weight /= weight.sum()
        raw = np.zeros((rows, length + 3), dtype=np.uint16)
        documents = np.zeros((rows, length + 3), dtype=np.int64)
        for row in range(rows):
            at = number = 0
            while at < length + 3:
                talk = self.kinds[names[self.rng.choice(len(names), p=weight)]].next()[: length + 3 - at]
                raw[row, at : at + len(talk)] = talk
                documents[row, at : at + len(talk)] = number
                at, number = at + len(talk), number + 1
        return self._batch(raw, documents)

    def _batch(self, raw: np.ndarray, documents: np.ndarray) -> Batch:
        tokens = (raw & ID_BITS).astype(np.int64)
        weights = np.where(raw & 0x8000, 1.0, OTHER_WEIGHT).astype(np.float32)
        opening, closing = (
            self.silent
        )  # "<think></think>" is given in the prompt: whether to think is not the model's choice
        weights[:, 1:][(tokens[:, 1:] == closing) & (tokens[:, :-1] == opening)] = 0
        weights[:, 1:][documents[:, 1:] != documents[:, :-1]] = 0
        return Batch(torch.from_numpy(tokens), torch.from_numpy(documents), torch.from_numpy(weights))
