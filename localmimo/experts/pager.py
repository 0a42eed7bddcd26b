"""Pager: a store with what steers it: the router statistics of a profile, and the watch over free memory.

Opened and closed with an engine; knows neither tokens nor weights.
"""

import math
import time
import warnings
from contextlib import suppress
from pathlib import Path

from localmimo.config import ModelConfig
from localmimo.experts import placement
from localmimo.experts.policy import Adaptive, Page
from localmimo.experts.pressure import Pressure, low_bytes
from localmimo.experts.profile import profile_path
from localmimo.experts.stats import RouterStats
from localmimo.experts.store import ExpertStore
from localmimo.machine import Machine
from localmimo.plan import Plan
from quant import Pack
from quant.pack import experts_of

PUBLISH_S = 1.0  # between two looks at where the pages lie, at least


class Pager:
    """The store of a pack; its hottest pages are read in the background from the start."""

    def __init__(
        self,
        pack: Pack,
        config: ModelConfig,
        plan: Plan,
        *,
        profile: str | None = None,
        prefetch: bool = True,
        trust: bool = False,
    ) -> None:
        self.profile = None if profile is None else profile_path(pack.path, pack.id, profile)
        self._stats = _statistics(self.profile, config)
        policy = Adaptive(self._stats, room_for_all=plan.n_slots >= plan.n_pages)
        self.store = ExpertStore(pack, plan.page_bytes, plan.n_slots, policy, prefetch=prefetch, trust=trust)
        self.store.warm(self._first_pages(pack, plan))
        low = low_bytes(Machine.probe().ram_bytes)
        self._n_experts = experts_of(pack)
        self._published_s = -math.inf
        self._pressure = Pressure(self.store, plan.page_bytes, low, _free_ram_bytes)

    def _first_pages(self, pack: Pack, plan: Plan) -> list[Page]:
        """What to read before it is asked for: a profile's hottest pages, and where all fit then all others."""
        hottest = self._stats.hottest(plan.n_slots)
        if self.profile is None or plan.n_slots < plan.n_pages:
            return hottest
        known = set(hottest)
        every = ((layer, expert) for layer, n in experts_of(pack).items() for expert in range(n))
        return hottest + [page for page in every if page not in known]

    def publish(self) -> None:
        """Let `stats` see where the pages lie now, if it has been a while."""
        if self.profile is None or time.monotonic() - self._published_s < PUBLISH_S:
            return
        with suppress(OSError):  # a full disk is no reason to fail: nobody may be looking
            placement.publish(self.profile, self.store.where(), self._n_experts)
        self._published_s = time.monotonic()

    def close(self) -> None:
        """Stop reading, and add what was seen to the profile; a warning says where that cannot be saved."""
        self._pressure.close()
        self.store.close()
        if self.profile is not None:
            placement.withdraw(self.profile)
        if self.profile is not None and not self._stats.save(self.profile):
            warnings.warn(str(self._stats.warning), stacklevel=3)


def _statistics(profile: Path | None, config: ModelConfig) -> RouterStats:
    if profile is None:
        return RouterStats(config.moe_layers, config.n_experts)
    return RouterStats.open(profile, config.moe_layers, config.n_experts)


def _free_ram_bytes() -> int:
    return Machine.probe().free_ram_bytes
