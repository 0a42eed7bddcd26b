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

    def took(self, depth: int, seconds: float, tokens: int) -> None:
        """A pass with so many drafts took so long, and gave so many tokens."""


@dataclass(slots=True)
class FixedDepth:
    """Always the same depth."""

    fixed: int

    def depth(self) -> int:
        return self.fixed

    def took(self, depth: int, seconds: float, tokens: int) -> None: ...


class MeasuredDepth:
    """Finds the depth that gives the most tokens per second, and risks little to find it.

    Two depths are compared pass by pass in turns, by the median of the ratios of a pass to its neighbours: a machine
    whose speed changes from one second to the next, or that stalls now and then, does not change those. It starts
    without drafts, tries one draft, and then one more for as long as that pays; later it looks at no drafts again,
    first soon, then less often. Passes with drafts may lose ALLOWANCE tokens' time, against passes without; then it
    goes back to none and waits, longer each time.
    """

    COLD = 2  # passes that are not counted
    LEAST, MOST = 3, 7  # ratios for a verdict
    CLEAR = 0.6  # a verdict before there are MOST: the logarithm of the gain, times the root of their number
    GAIN = 1.02  # tokens per second by which a depth must be better to be moved to
    STAY_FIRST, STAY = 8, 64  # passes between two comparisons
    WAIT = 64  # passes without drafts after they did not pay
    ALLOWANCE = 1.5  # tokens' time: 0.6 % of 256 tokens; a try that is under way may go beyond it
    FORGIVEN = 0.004  # what a pass without drafts gives back of it
    CREDIT = 8.0  # tokens' time that were gained and may be lost again
    MEMORY = 48  # passes over which a head's drafts are counted

    def __init__(self, most: int) -> None:
        self.most = most
        self.current = 0
        self._rival: int | None = None  # compared with the current depth, in turns
        self._left = self.COLD  # passes until the next comparison
        self._looks = 0  # comparisons since the last move
        self._paired = ABTiming()  # the current depth and its rival
        self._first = False  # whether the rival's next pass is its first: a head's ring is filled then
        # By depth: passes without drafts that one costs. By head: which of the drafts it came to were right.
        self._costs: list[float | None] = [1.0, *[None] * most]
        self._drawn: list[deque[bool]] = [deque(maxlen=self.MEMORY) for _ in range(most)]
        self._lost = 0.0  # tokens' time
        self._wait = self.WAIT

    def depth(self) -> int:
        return self.current if self._rival is None or not self._paired.second else self._rival

    def took(self, depth: int, seconds: float, tokens: int) -> None:
        if depth != self.depth():  # cut short by the end of something: says nothing
            return
        for head in range(min(depth, tokens)):
            self._drawn[head].append(head + 1 < tokens)
        if self._rival is not None:
            self._compare(self._rival, seconds)
        self._count_loss(depth, tokens)
        self._left -= 1
        if self._lost > self.ALLOWANCE and (self.current or self._rival):
            self._doubt()
        elif self._rival is not None:
            self._judge(self._rival)
        elif self._left <= 0:
            self._look()

    def tokens(self, depth: int) -> float:
        """Tokens that a pass gives; a head that was not tried is as often right as the one before it."""
        given = chance = right = 1.0
        for drawn in self._drawn[:depth]:
            right = sum(drawn) / len(drawn) if drawn else right
            chance *= right
            given += chance
        return given

    def cost(self, depth: int) -> float:
        """Passes without drafts that one of a depth takes as long as; at first as many as it has tokens."""
        known = self._costs[depth]
        return depth + 1.0 if known is None else known

    def _compare(self, rival: int, seconds: float) -> None:
        if self._first and self._paired.second:
            self._first, self._paired = False, ABTiming()
            return
        self._paired.note(seconds)
        if not self._paired.ratios:
            return
        if rival:
            self._costs[rival] = self.cost(self.current) * self._paired.ratio
        else:
            self._costs[self.current] = 1 / self._paired.ratio

    def _count_loss(self, depth: int, tokens: int) -> None:
        lost = min(self.cost(depth), depth + 1.3) - tokens if depth else -self.FORGIVEN
        self._lost = max(-self.CREDIT if self.current else 0.0, self._lost + lost)

    def _judge(self, rival: int) -> None:
        """End the comparison once it is clear enough; the first drafts are begun on nothing less than all ratios."""
        n = len(self._paired.ratios)
        if n < self.LEAST:
            return
        gain = self.tokens(rival) / self.tokens(self.current) / self._paired.ratio
        certain = abs(log(gain)) >= self.CLEAR / n**0.5 and (self.current or gain < 1)
        if n < self.MOST and not certain:
            return
        self._rival = None
        if gain > self.GAIN and rival:
            self._move(rival)
        elif gain > self.GAIN or not self.current:
            self._give_up()
        else:
            self._stay()

    def _move(self, depth: int) -> None:
        self.current, self._looks, self._wait = depth, 0, self.WAIT
        self._left = 1 if depth < self.most else self.STAY_FIRST

    def _stay(self) -> None:
        self._left = min(self.STAY, self.STAY_FIRST << self._looks)
        self._looks += 1

    def _doubt(self) -> None:
        """Too much was lost: a depth that has paid is held against none once more, as the machine is now."""
        if self.current and self._rival != 0:
            self._lost = 0.0
            self._hold_against(0)
        else:
            self._give_up()

    def _give_up(self) -> None:
        gained = self._lost < 0
        self._rival, self.current, self._looks, self._lost = None, 0, 0, max(0.0, self._lost)
        self._left = self.STAY_FIRST if gained else self._wait
        if not gained:
            self._wait = min(4 * self.WAIT, 2 * self._wait)

    def _look(self) -> None:
        """Compare with the next depth: in turn one more, where that may pay, and none."""
        deeper = self.current + 1
        if deeper <= self.most and self._looks % 2 == 0 and self._may_pay(deeper):
            self._hold_against(deeper)
        elif self.current:
            self._hold_against(0)
        else:
            self._left = self.STAY_FIRST

    def _hold_against(self, rival: int) -> None:
        self._rival, self._paired, self._first = rival, ABTiming(), rival > 0

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
