"""Counters: what was asked of the store, and in which tier it was found. Counts alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from localmimo.limits import TIERS


@dataclass(slots=True)
class PageCounters:
    """Counters since the store was opened."""

    gpu_pages: int = 0  # found on the GPU
    ram_pages: int = 0  # found in RAM
    disk_pages: int = 0  # read from disk, on demand or by a guess that was right
    disk_bytes: int = 0  # read in all, wrong guesses included
    read_s: float = 0.0  # time in which at least one read was under way
    prefetch_useful: int = 0  # guessed pages that were then asked for
    prefetch_wasted: int = 0  # guessed pages that were read for nothing
    uploads: int = 0  # pages copied to the GPU

    @property
    def by_tier(self) -> dict[str, int]:
        """Pages that were asked for, by the tier they were found in."""
        return {tier: getattr(self, f"{tier}_pages") for tier in TIERS}

    @property
    def n_pages(self) -> int:
        """Pages that were asked for."""
        return sum(self.by_tier.values())

    def since(self, before: "PageCounters") -> "PageCounters":
        """The difference to an earlier reading."""
        earlier = asdict(before)
        return PageCounters(**{name: value - earlier[name] for name, value in asdict(self).items()})

    def copy(self) -> "PageCounters":
        return PageCounters(**asdict(self))


def hit_shares(pages: Mapping[str, int]) -> dict[str, float]:
    """Tier -> its share of the pages; empty without any. The GPU is listed only where it answered a request."""
    total = sum(pages.values())
    return {tier: n / total for tier, n in pages.items() if total and (n or tier != "gpu")}
