"""Router statistics: how often each expert of each layer is used, lately and over the long run.

Starts from a profile of earlier sessions and adds to it on `save`. Knows layers and experts as numbers; no bytes, no
slots, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmimo.experts.policy.profile import (
    SESSION_TOKENS,
    BadProfile,
    Profile,
    read_profile,
    sole_writer,
    write_profile,
)

HALF_LIVES = (2, 8, 32, 128)  # tokens
HEAD_START = 0.3  # weight of a profile's figures in the decayed ones at the start of a session

Page = tuple[int, int]  # (layer, expert)
Array = NDArray[np.float32]


class RouterStats:
    """Counts over the MoE `layers` (their indices in the model, ascending) of a model with `n_experts` a layer.

    A row is a layer's place among `layers`. `use[h, row]` is the chance per token that each expert is used: means that
    are decayed with HALF_LIVES[h] tokens, over as much as was seen of them.
    """

    def __init__(self, layers: Sequence[int], n_experts: int) -> None:
        self.layers = tuple(layers)
        self.n_experts = n_experts
        self.row = {layer: row for row, layer in enumerate(self.layers)}
        n_rows, n_half = len(self.layers), len(HALF_LIVES)
        self.use: Array = np.zeros((n_half, n_rows, n_experts), dtype=np.float32)
        self.seen: Array = np.zeros((n_half, n_rows), dtype=np.float32)  # the weight behind `use`, in tokens
        self.last_used = np.full((n_rows, n_experts), -1, dtype=np.int64)  # in steps of that layer; -1: never
        self.steps = np.zeros(n_rows, dtype=np.int64)  # of each layer, since the start
        self.warning: str | None = None  # why a profile could not be read or written
        self._profile = Profile.empty(n_rows, n_experts)
        self._fresh = Profile.empty(
            n_rows, n_experts
        )  # its arrays: what this session saw since the last save
        self._fresh_steps = np.zeros(n_rows, dtype=np.int64)
        self._decay = np.array([[0.5 ** (1 / half)] for half in HALF_LIVES], dtype=np.float32)
        self._waiting: list[tuple[int, list[int]]] = []  # rows and experts not yet counted

    def request(self, layer: int, experts: Sequence[int]) -> None:
        """One decode step uses these experts of a layer."""
        row = self.row[layer]
        if self._waiting and row <= self._waiting[-1][0]:
            self.settle()
        self._waiting.append((row, list(experts)))

    def settle(self) -> None:
        """Count what was requested. Several layers at once, because that costs little more than one."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        rows = np.array([row for row, _ in waiting])
        places = np.repeat(rows, [len(experts) for _, experts in waiting])
        chosen = np.concatenate([experts for _, experts in waiting]).astype(np.intp)
        self.seen[:, rows] = self.seen[:, rows] * self._decay + 1
        share = 1 / self.seen[:, rows]
        self.use[:, rows] *= (1 - share)[:, :, None]
        self.use[:, places, chosen] += np.repeat(share, [len(experts) for _, experts in waiting], axis=1)
        self.last_used[places, chosen] = self.steps[places]
        self.steps[rows] += 1
        self._fresh_steps[rows] += 1
        self._fresh.uses[places, chosen] += 1

    # ---- what is likely ----

    def chances(self) -> Array:
        """Chance per token that an expert is used [rows, experts]: the mean of the recent views and the long run."""
        self.settle()
        session = min(1.0, SESSION_TOKENS / max(1, self._fresh_steps.max(initial=0)))
        tokens = self._profile.tokens + session * self._fresh_steps[:, None]
        long_run = (self._profile.uses + session * self._fresh.uses) / np.maximum(tokens, 1e-9)
        return np.asarray((self.use.sum(0) + long_run) / (len(HALF_LIVES) + 1), dtype=np.float32)

    def hottest(self, n: int) -> list[Page]:
        """The n pages most likely to be used, likeliest first; only pages that were ever used."""
        chances = self.chances().reshape(-1)
        order = np.argsort(-chances, kind="stable")[: max(0, n)]
        return [self._page(int(place)) for place in order if chances[place] > 0]

    def _page(self, place: int) -> Page:
        row, expert = divmod(place, self.n_experts)
        return self.layers[row], expert

    # ---- the profile ----

    @classmethod
    def open(cls, path: Path, layers: Sequence[int], n_experts: int) -> RouterStats:
        """Statistics that start from a profile; an empty start where there is none, or `warning` says it is bad."""
        stats = cls(layers, n_experts)
        try:
            profile = read_profile(path, len(stats.layers), n_experts)
        except BadProfile as error:
            stats.warning = (
                f"The statistics in {path} are not used: the file {error}. It is replaced at the end."
            )
            return stats
        if profile is not None:
            stats._start_from(profile)
        return stats

    def _start_from(self, profile: Profile) -> None:
        self._profile = profile
        known = (profile.recent + profile.uses / max(profile.tokens, 1e-9)) / 2
        self.use[:] = known
        self.seen[:] = HEAD_START / (1 - self._decay)

    def _session(self) -> Profile:
        return Profile(
            float(self._fresh_steps.max(initial=0)),
            self._fresh.uses,
            self.use[-1].copy(),
        )

    def save(self, path: Path) -> bool:
        """Add what was seen since the start, or the last save, to the profile at `path`; False: see `warning`.

        The file is read again first: what other processes added meanwhile stays.
        """
        self.settle()
        if not self._fresh_steps.any():
            return True
        try:
            with sole_writer(path):
                self._profile = self._newest(path).plus(self._session())
                write_profile(path, self._profile)
        except OSError as error:
            self.warning = f"The statistics could not be saved to {path}: {error.strerror or error}."
            return False
        self._fresh = Profile.empty(len(self.layers), self.n_experts)
        self._fresh_steps[:] = 0
        return True

    def _newest(self, path: Path) -> Profile:
        try:
            found = read_profile(path, len(self.layers), self.n_experts)
        except BadProfile:
            found = None
        return found if found is not None else Profile.empty(len(self.layers), self.n_experts)
