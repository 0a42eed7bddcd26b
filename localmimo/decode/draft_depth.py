"""Draft depth: decides how many tokens are drafted before each pass of the main model.

Knows passes, seconds and counts of tokens. Must not know sessions, logits or what a token is.
"""

from collections import deque
from dataclasses import dataclass
from math import log
from typing import Literal, Protocol

from localmimo.errors import BadRequest
from localmimo.hardware.ab_timing import ABTiming
from localmimo.limits import MAX_DRAFTS

Draft = int | Literal["auto"]


def check_draft(draft: object) -> Draft:
    """What `draft` may be: "auto", or 0 to 3 tokens at a time."""
    if draft == "auto":
        return "auto"
    text = str(draft)
    if text in ("0", "1", "2", "3"):
        return int(text)
    raise BadRequest(f"draft is {draft!r}; it is auto or a number of tokens from 0 to {MAX_DRAFTS}.")


class DepthPolicy(Protocol):
    """Decides how many tokens are drafted."""

    def depth(self) -> int:
        """Drafts for the next pass."""

    def record_pass(self, depth: int, seconds: float, tokens: int) -> None:
        """A pass with so many drafts took so long, and gave so many tokens."""


@dataclass(slots=True)
class FixedDepth:
    """Always the same depth."""

    fixed: int

    def depth(self) -> int:
        return self.fixed

    def record_pass(self, depth: int, seconds: float, tokens: int) -> None: ...


class MeasuredDepth:
    """Finds the depth that gives the most tokens per second, and loses little time while it searches.

    Two depths are compared in alternating passes, by the median of the ratios of a pass to its neighbours. A machine
    whose speed changes from second to second, or that stalls now and then, hardly moves that median. It starts
    without drafts, tries one draft, and then one more for as long as that pays. Later it compares with no drafts
    again, first soon, then less often. Passes with drafts may lose MAX_LOSS tokens' time against passes without;
    then it returns to none and waits, longer each time.
    """

    N_UNCOUNTED = 2  # passes that are not counted
    MIN_RATIOS, MAX_RATIOS = 3, 7  # ratios that end a comparison
    CERTAINTY = (
        0.6  # ends it before there are MAX_RATIOS: the logarithm of the gain, times the root of their number
    )
    MIN_GAIN = 1.02  # tokens per second by which a depth must be better to be moved to
    MIN_INTERVAL, MAX_INTERVAL = 8, 64  # passes between two comparisons
    MIN_WAIT = 64  # passes without drafts after they did not pay
    MAX_LOSS = 1.5  # tokens' time: 0.6 % of 256 tokens; a comparison that is under way may exceed it
    RECOVERY = 0.004  # tokens' time by which a pass without drafts reduces the loss
    MAX_CREDIT = 8.0  # tokens' time gained earlier, which may be lost again
    N_RECENT = 48  # passes over which a head's drafts are counted

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        self.current = 0
        self._compared: int | None = None  # compared with the current depth, in turns
        self._left = self.N_UNCOUNTED  # passes until the next comparison
        self._n_comparisons = 0  # comparisons since the last move
        self._timing = ABTiming()  # of the current depth and the other one
        self._is_first_pass = False  # the other depth's next pass is its first: a head's ring is filled then
        # By depth: passes without drafts that one costs. By head: which of the drafts it came to were right.
        self._costs: list[float | None] = [1.0, *[None] * max_depth]
        self._was_right: list[deque[bool]] = [deque(maxlen=self.N_RECENT) for _ in range(max_depth)]
        self._lost = 0.0  # tokens' time
        self._wait = self.MIN_WAIT

    def depth(self) -> int:
        return self.current if self._compared is None or not self._timing.second else self._compared

    def record_pass(self, depth: int, seconds: float, tokens: int) -> None:
        if depth != self.depth():  # cut short by the end of an answer: its time says nothing
            return
        for head in range(min(depth, tokens)):
            self._was_right[head].append(head + 1 < tokens)
        if self._compared is not None:
            self._take_ratio(self._compared, seconds)
        self._count_loss(depth, tokens)
        self._left -= 1
        if self._lost > self.MAX_LOSS and (self.current or self._compared):
            self._recheck()
        elif self._compared is not None:
            self._conclude(self._compared)
        elif self._left <= 0:
            self._next_comparison()

    def tokens(self, depth: int) -> float:
        """Tokens that a pass gives; a head that was not tried is as often right as the one before it."""
        given = chance = right = 1.0
        for outcomes in self._was_right[:depth]:
            right = sum(outcomes) / len(outcomes) if outcomes else right
            chance *= right
            given += chance
        return given

    def cost(self, depth: int) -> float:
        """Passes without drafts that one of a depth takes as long as; at first as many as it has tokens."""
        known = self._costs[depth]
        return depth + 1.0 if known is None else known

    def _take_ratio(self, other_depth: int, seconds: float) -> None:
        if self._is_first_pass and self._timing.second:
            self._is_first_pass, self._timing = False, ABTiming()
            return
        self._timing.note(seconds)
        if not self._timing.ratios:
            return
        if other_depth:
            self._costs[other_depth] = self.cost(self.current) * self._timing.ratio
        else:
            self._costs[self.current] = 1 / self._timing.ratio

    def _count_loss(self, depth: int, tokens: int) -> None:
        lost = min(self.cost(depth), depth + 1.3) - tokens if depth else -self.RECOVERY
        self._lost = max(-self.MAX_CREDIT if self.current else 0.0, self._lost + lost)

    def _conclude(self, other_depth: int) -> None:
        """End the comparison once it is clear enough. Drafting itself begins only after MAX_RATIOS ratios."""
        n = len(self._timing.ratios)
        if n < self.MIN_RATIOS:
            return
        gain = self.tokens(other_depth) / self.tokens(self.current) / self._timing.ratio
        certain = abs(log(gain)) >= self.CERTAINTY / n**0.5 and (self.current or gain < 1)
        if n < self.MAX_RATIOS and not certain:
            return
        self._compared = None
        if gain > self.MIN_GAIN and other_depth:
            self._move(other_depth)
        elif gain > self.MIN_GAIN or not self.current:
            self._stop_drafting()
        else:
            self._stay()

    def _move(self, depth: int) -> None:
        self.current, self._n_comparisons, self._wait = depth, 0, self.MIN_WAIT
        self._left = 1 if depth < self.max_depth else self.MIN_INTERVAL

    def _stay(self) -> None:
        self._left = min(self.MAX_INTERVAL, self.MIN_INTERVAL << self._n_comparisons)
        self._n_comparisons += 1

    def _recheck(self) -> None:
        """Too much time was lost: a depth that has paid is compared with none once more."""
        if self.current and self._compared != 0:
            self._lost = 0.0
            self._compare_with(0)
        else:
            self._stop_drafting()

    def _stop_drafting(self) -> None:
        gained = self._lost < 0
        self._compared, self.current, self._n_comparisons, self._lost = None, 0, 0, max(0.0, self._lost)
        self._left = self.MIN_INTERVAL if gained else self._wait
        if not gained:
            self._wait = min(4 * self.MIN_WAIT, 2 * self._wait)

    def _next_comparison(self) -> None:
        """Start the next comparison: alternately with one draft more, where that may pay, and with none."""
        deeper = self.current + 1
        if deeper <= self.max_depth and self._n_comparisons % 2 == 0 and self._may_pay(deeper):
            self._compare_with(deeper)
        elif self.current:
            self._compare_with(0)
        else:
            self._left = self.MIN_INTERVAL

    def _compare_with(self, other_depth: int) -> None:
        self._compared, self._timing, self._is_first_pass = other_depth, ABTiming(), other_depth > 0

    def _may_pay(self, deeper: int) -> bool:
        """Whether a depth can be faster, one more draft costing and giving what the last one did."""
        if deeper == 1:
            return True
        cost_now = self.cost(self.current)
        step = (cost_now - 1) / self.current
        return self.tokens(deeper) / (cost_now + step) > self.tokens(self.current) / cost_now


def depth_policy_of(draft: Draft, n_heads: int) -> DepthPolicy:
    """The depth policy of a setting, with so many draft heads."""
    return (
        MeasuredDepth(n_heads)
        if draft == "auto" and n_heads
        else FixedDepth(min(0 if draft == "auto" else draft, n_heads))
    )
