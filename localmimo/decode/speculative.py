"""Lookahead: has the main model check drafted tokens in one pass, and decides how many to draft.

Knows sessions, logits and clocks; nothing of text, and nothing of how a token is drawn. A draft never changes what is
drawn: the logits after it are used only where the very token was drawn, and otherwise it is taken back.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import log
from typing import Any, Literal, Protocol

from torch import Tensor

from localmimo.decode.mtp import Choose
from localmimo.decode.session import Session
from localmimo.errors import BadRequest
from localmimo.hardware.ab_timing import ABTiming
from localmimo.limits import MAX_DRAFTS
from localmimo.model.transformer import nothing_to_check

Draft = int | Literal["auto"]


def check_draft(draft: object) -> Draft:
    """What `draft` may be: "auto", or 0 to 3 tokens at a time."""
    if draft == "auto":
        return "auto"
    text = str(draft)
    if text in ("0", "1", "2", "3"):
        return int(text)
    raise BadRequest(f"draft is {draft!r}; it is auto or a number of tokens from 0 to {MAX_DRAFTS}.")


@dataclass(slots=True)
class DraftStats:
    """What drafting took and gave."""

    passes: int = 0  # of the main model, after the prompt
    drafted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)  # tokens, by head
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)
    pages: list[int] = field(
        default_factory=lambda: [0] * (MAX_DRAFTS + 1)
    )  # asked for, by depth of the pass
    passes_at: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFTS + 1))

    @property
    def acceptance(self) -> list[float]:
        """Share of each head's drafts that were drawn."""
        return [a / n if n else 0.0 for a, n in zip(self.accepted, self.drafted, strict=True)]

    @property
    def expert_growth(self) -> list[float]:
        """Experts that a pass asks for, by its depth, over those of a pass without drafts; 0 where not known."""
        per_pass = [p / n if n else 0.0 for p, n in zip(self.pages, self.passes_at, strict=True)]
        return [pages / per_pass[0] if per_pass[0] else 0.0 for pages in per_pass]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"acceptance": self.acceptance, "expert_growth": self.expert_growth}


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
        here = self.cost(self.current)
        step = (here - 1) / self.current
        return self.tokens(deeper) / (here + step) > self.tokens(self.current) / here


def depth_policy_of(draft: Draft, n_heads: int) -> DepthPolicy:
    """The pace of a setting, with so many heads at hand."""
    return (
        MeasuredDepth(n_heads)
        if draft == "auto" and n_heads
        else FixedDepth(min(0 if draft == "auto" else draft, n_heads))
    )


@dataclass(slots=True)
class SpeculativeSteps:
    """Steps a session, several tokens at a time where drafts come true."""

    session: Session
    pace: DepthPolicy
    stats: DraftStats
    pages: Callable[[], int]  # pages asked of the experts so far
    _drafts: deque[int] = field(default_factory=deque)  # appended to the session, not drawn yet
    _logits: Tensor | None = None  # after each token of the pass
    _row: int = 0
    _depth: int = 0
    _seconds: float = 0.0

    def advance(
        self, token: int, room: int, choose: Choose, check: Callable[[], None] = nothing_to_check
    ) -> Tensor:
        """The logits [vocab] after `token`, which was drawn. At most `room` more tokens are wanted after it."""
        if self._drafts and self._drafts[0] == token:
            assert self._logits is not None
            self.stats.accepted[self._row] += 1
            self._drafts.popleft()
            self._row += 1
            return self._logits[self._row]
        self.settle()
        return self._pass(token, self._room(room), choose, check)

    def settle(self) -> None:
        """Take back drafts that were not drawn: the session then holds what was, but for the last token."""
        if self._logits is None:
            return
        if self._drafts:
            self.session.rewind(len(self._drafts))
        self.pace.took(self._depth, self._seconds, self._row + 1)
        self._drafts.clear()
        self._logits = None

    def _room(self, room: int) -> int:
        return max(0, min(room, self.session.context - self.session.position - 1, self.session.n_heads))

    def _pass(self, token: int, room: int, choose: Choose, check: Callable[[], None]) -> Tensor:
        began, pages = time.perf_counter(), self.pages()
        depth = min(self.pace.depth(), room)
        drafts = self.session.draft(token, depth, choose) if depth else []
        logits = self.session.extend([token, *drafts], check)
        self._logits, self._drafts, self._row, self._depth = logits, deque(drafts), 0, depth
        self._seconds = time.perf_counter() - began
        self._count(depth, self.pages() - pages)
        return logits[0]

    def _count(self, depth: int, pages: int) -> None:
        stats = self.stats
        stats.passes += 1
        stats.passes_at[depth] += 1
        stats.pages[depth] += pages
        for k in range(depth):
            stats.drafted[k] += 1
