"""Drafts of a chosen depth, and heads that know the text."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from localmimo.decode.draft_depth import FixedDepth
from localmimo.decode.session import Session
from localmimo.engine import Engine


@contextmanager
def drafting(engine: Engine, depth: int) -> Iterator[None]:
    before, engine._depth_policy = engine._depth_policy, FixedDepth(depth)
    try:
        yield
    finally:
        engine._depth_policy = before


@contextmanager
def prophecy(truth: list[int], n_prompt: int, right: float, seed: int) -> Iterator[None]:
    """Heads that foresee the text, each token with a chance: every course of accepting and taking back comes up."""
    rng, real = random.Random(seed), Session.draft

    def foresee(self: Session, token: int, n: int, choose: Callable) -> list[int]:
        at = self.position + 1 - n_prompt
        told = [t if rng.random() < right else rng.randrange(3, 97) for t in truth[at : at + n]]
        return [*told, *[5] * n][:n]

    Session.draft = foresee  # type: ignore[method-assign]
    try:
        yield
    finally:
        Session.draft = real  # type: ignore[method-assign]
