"""Replay: a router trace played through the policies, all with the same number of slots. No torch, no pages, no disk.

Every miss is admitted, as in the store. LRU, LFU and Belady are played page by page, as textbooks have them; ours hears
all pages of a line at once, as it does from the store, and never gives up one of them while another is being read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from localmimo.errors import BadRequest
from localmimo.experts.policy.baselines import Adaptive, Belady, Lfu, Lru, Page, Policy
from localmimo.experts.policy.router_stats import RouterStats
from localmimo.experts.policy.trace import Trace

MAX_PAGES = 1 << 18  # layers x experts: ten times those of the largest member


@dataclass(frozen=True, slots=True)
class Replayed:
    """Hit rates of the policies at one number of slots."""

    slots: int
    requests: int
    ours: float
    lru: float
    lfu: float
    belady: float

    @property
    def gap_closed(self) -> float | None:
        """Where ours lies between LRU, 0, and Belady, 1; None where these are equal."""
        gap = self.belady - self.lru
        return (self.ours - self.lru) / gap if gap else None


def replay(trace: Trace, slots: int) -> Replayed:
    """Play a trace through every policy."""
    layers, n_experts = sorted(set(trace.layers)), trace.n_experts
    if len(layers) * n_experts > MAX_PAGES:
        raise BadRequest(
            f"The trace has {len(layers)} layers of {n_experts:,} experts; the replay has room for {MAX_PAGES:,} "
            "experts in all: record a trace of fewer layers."
        )
    lines = list(trace)
    pages = [(layer, [expert]) for layer, experts in lines for expert in experts]
    size = (layers[-1] + 1, n_experts)
    hits = {
        "ours": play(Adaptive(RouterStats(layers, n_experts)), lines, slots),
        "lru": play(Lru(*size), pages, slots),
        "lfu": play(Lfu(*size), pages, slots),
        "belady": play(Belady(trace.pages(n_experts), n_experts), pages, slots),
    }
    return Replayed(slots, trace.n_requests, **{name: n / trace.n_requests for name, n in hits.items()})


def play(policy: Policy, lines: Sequence[tuple[int, list[int]]], slots: int) -> int:
    """How many of the pages that the lines ask for are held when they are asked for."""
    held: set[Page] = set()
    hits = 0
    for layer, experts in lines:
        policy.request(layer, experts)
        wanted = [(layer, expert) for expert in experts]
        for place, page in enumerate(wanted):
            if page in held:
                hits += 1
                continue
            if len(held) == slots:
                keep = wanted if slots >= len(wanted) else wanted[place:]
                victim = (policy.victims(1, keep) or policy.victims(1, ()))[0]
                policy.drop(victim)
                held.remove(victim)
            policy.admit(page)
            held.add(page)
    return hits
