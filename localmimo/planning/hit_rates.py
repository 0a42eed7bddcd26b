"""Hit rates: which share of expert requests a number of slots should answer, replayed, expected, or assumed.

A recorded trace is replayed through the policies; a profile of earlier sessions gives what its hottest pages would
answer; with neither, others' published caches have to do. Knows pages and counts; no bytes and no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from localmimo.experts.policy.adaptive import Adaptive
from localmimo.experts.policy.baselines import Lru, Policy
from localmimo.experts.policy.profile import BadProfile, profile_path, read_profile
from localmimo.experts.policy.replay import play
from localmimo.experts.policy.router_stats import RouterStats
from localmimo.experts.policy.trace import Trace
from localmimo.model.config import ModelConfig

Range = tuple[float, float]  # low, high

# For caches of a share of the experts: LRU on MiMo-V2.6-Flash (derived from the bytes that colibri read), and on a
# model of 512 experts a layer (llama.cpp pull request 27861).
_PUBLISHED = ((0.125, 0.59, 0.67), (0.25, 0.74, 0.81))
_ONE_TOKEN = (0.0, 0.3)  # with no more slots than one token uses
LEAST_TOKENS = 64  # of a profile that says anything


def assumed_hits(share: float, cycle: float) -> Range:
    """The published range for a cache of this share of the experts; `cycle`: the share that one token uses."""
    if share >= 1:
        return 1.0, 1.0
    points = [(cycle, *_ONE_TOKEN), *(point for point in _PUBLISHED if point[0] > cycle), (1.0, 1.0, 1.0)]
    at = [point[0] for point in points]
    low = float(np.interp(share, at, [point[1] for point in points]))
    high = float(np.interp(share, [0.0, *at], [0.0, *(point[2] for point in points)]))
    return min(low, high), max(low, high)


def replayed_hits(trace: Trace, config: ModelConfig, n_slots: int) -> Range:
    """Hit rates of the second half of a trace under LRU and under the store's own policy, the lower one first."""
    lines = list(trace)
    half = len(lines) // 2
    asked = sum(len(experts) for _, experts in lines[half:])

    def rate(make: Callable[[], Policy]) -> float:
        found = play(make(), lines, n_slots) - play(make(), lines[:half], n_slots)
        return found / max(1, asked)

    rates = (
        rate(lambda: Lru(len(config.layers), config.n_experts)),
        rate(lambda: Adaptive(RouterStats(config.moe_layers, config.n_experts))),
    )
    return min(rates), max(rates)


def profile_hits(pack: Path, pack_id: str, config: ModelConfig, n_slots: int) -> float | None:
    """The share of the requests of earlier sessions that fell on their hottest pages; None where nothing is known."""
    try:
        profile = read_profile(profile_path(pack, pack_id), len(config.moe_layers), config.n_experts)
    except BadProfile:
        return None
    if profile is None or profile.tokens < LEAST_TOKENS:
        return None
    uses = np.sort(profile.uses, axis=None)[::-1]
    return float(uses[:n_slots].sum() / max(1e-9, uses.sum()))
