"""Lookahead: has the main model check drafted tokens in one pass, and decides how many to draft.

Knows sessions, logits and clocks; nothing of text, and nothing of how a token is drawn. A draft never changes what is
drawn: the logits after it are used only where the very token was drawn, and otherwise it is taken back.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, Protocol

from torch import Tensor

from localmimo.errors import BadRequest
from localmimo.model import nothing_to_check
from localmimo.mtp import Choose
from localmimo.session import Session

Draft = int | Literal["auto"]
MOST_DRAFTS = 3


def check_draft(draft: object) -> Draft:
    """What `draft` may be: "auto", or 0 to 3 tokens at a time."""
    if draft == "auto":
        return "auto"
    text = str(draft)
    if text in ("0", "1", "2", "3"):
        return int(text)
    raise BadRequest(f"draft is {draft!r}; it is auto or a number of tokens from 0 to {MOST_DRAFTS}.")


@dataclass(slots=True)
class DraftStats:
    """What drafting took and gave."""

    passes: int = 0  # of the main model, after the prompt
    drafted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)  # tokens, by head
    accepted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    pages: list[int] = field(
        default_factory=lambda: [0] * (MOST_DRAFTS + 1)
    )  # asked for, by depth of the pass
    passes_at: list[int] = field(default_factory=lambda: [0] * (MOST_DRAFTS + 1))

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


class Pace(Protocol):
    """Decides how many tokens are drafted."""

    def depth(self) -> int:
        """Drafts for the next pass."""

    def took(self, depth: int, seconds: float, tokens: int) -> None:
        """A pass with so many drafts took so long, and gave so many tokens."""


@dataclass(slots=True)
class Steady:
    """Always the same depth."""

    fixed: int

    def depth(self) -> int:
        return self.fixed

    def took(self, depth: int, seconds: float, tokens: int) -> None: ...


class Measured:
    """Finds the depth that gives the most tokens per second, and risks little to find it.

    What it knows of a depth are its last passes: seconds, tokens. It starts without drafts, tries one more
    draft for a few passes, and moves where that was faster; then it looks at no drafts again, first soon, then
    less often, since the caches of a model grow warm while it speaks. Time lost to tries, against passes without
    drafts, may reach ALLOWANCE tokens' time; then it goes back to none and waits, longer each time.
    """

    COLD, WARM, TRY = 2, 5, 5  # passes: not counted, before the first try, of a try
    STAY_FIRST, STAY = 8, 64  # passes between looks at other depths
    WAIT = 64  # passes without drafts after they did not pay
    ALLOWANCE, FORGIVEN = (
        2.5,
        0.004,
    )  # tokens' time (1 % of 256 tokens), and what a pass without drafts gives back
    CREDIT = 8.0  # tokens' time that were gained and may be lost again
    SAMPLES = 16
    GAIN = 0.98  # a depth must take at most so much of another's time to be moved to

    def __init__(self, most: int) -> None:
        self.most = most
        self.current = 0
        self._cold = self.COLD
        self._passes: list[deque[tuple[float, int]]] = [deque(maxlen=self.SAMPLES) for _ in range(most + 1)]
        self._left = self.WARM  # passes until something is decided
        self._trying: int | None = None
        self._looks = 0  # at other depths, since the last move
        self._lost = 0.0  # seconds
        self._wait = self.WAIT

    def depth(self) -> int:
        return self.current if self._trying is None else self._trying

    def took(self, depth: int, seconds: float, tokens: int) -> None:
        if depth != self.depth():  # cut short by the end of something: says nothing
            return
        if self._cold:
            self._cold -= 1
            return
        usual = self.token_s(0)
        self._passes[depth].append((seconds, tokens))
        self._left -= 1
        if (
            usual is not None
        ):  # n drafts cost at most n passes, and the heads: what is more is the machine's hiccup
            seconds = min(seconds, (depth + 1.3) * usual)
            lost = seconds - tokens * usual if depth else -self.FORGIVEN * seconds
            self._lost = max(-self.CREDIT * usual if self.current else 0.0, self._lost + lost)
        if usual is not None and self._lost > self.ALLOWANCE * usual:
            self._doubt()
        elif self._left <= 0:
            self._decide()

    def token_s(self, depth: int) -> float | None:
        """Seconds per token at a depth, None where nothing is known of it."""
        if not self._passes[depth]:
            return None
        seconds, tokens = self._usual(depth)
        return seconds / tokens

    def _decide(self) -> None:
        if self._trying is not None:
            self._end_of_try(self._trying)
        elif (other := self._other()) is not None:
            self._passes[other].clear()
            self._trying, self._left = other, self.TRY
        else:
            self._stay()

    def _end_of_try(self, tried: int) -> None:
        ours, theirs = self.token_s(self.current), self.token_s(tried)
        self._trying = None
        if ours is None or theirs is None or theirs >= self.GAIN * ours:
            self._stay() if self.current else self._give_up()
        elif tried:
            self._move(tried)
        else:
            self._give_up()

    def _move(self, depth: int) -> None:
        self.current, self._looks, self._wait = depth, 0, self.WAIT
        self._left = 1 if 0 < depth < self.most else self.STAY_FIRST

    def _stay(self) -> None:
        self._left = min(self.STAY, self.STAY_FIRST << self._looks)
        self._looks += 1

    def _doubt(self) -> None:
        """Too much was lost: a depth that has paid is held against none once more, as the machine is now."""
        if not self.current or self._trying is not None:
            self._give_up()
            return
        here = self._passes[self.current]
        recent = list(here)[-self.TRY :]
        here.clear()
        here.extend(recent)
        self._passes[0].clear()
        self._trying, self._left, self._lost = 0, self.TRY, 0.0

    def _give_up(self) -> None:
        self._trying, self.current, self._looks, self._lost = None, 0, 0, max(0.0, self._lost)
        self._left = self._wait
        self._wait = min(8 * self.WAIT, 2 * self._wait)
        for passes in self._passes[1:]:
            passes.clear()

    def _other(self) -> int | None:
        """The depth to look at next: in turn one more, where that may pay, and none."""
        deeper = self.current + 1
        if deeper <= self.most and self._looks % 2 == 0 and self._may_pay(deeper):
            return deeper
        return 0 if self.current else None

    def _may_pay(self, deeper: int) -> bool:
        """Whether a depth can be faster, one more draft costing and giving what the last one did."""
        if deeper == 1 or not self._passes[deeper - 2] or not self._passes[deeper - 1]:
            return True
        before, here = self._usual(deeper - 2), self._usual(deeper - 1)
        return (2 * here[0] - before[0]) / (2 * here[1] - before[1]) < here[0] / here[1]

    def _usual(self, depth: int) -> tuple[float, float]:
        """Seconds (the median: a busy machine stalls now and then) and tokens (the mean) of a pass."""
        passes = self._passes[depth]
        return median(seconds for seconds, _ in passes), sum(n for _, n in passes) / len(passes)


def pace_of(draft: Draft, n_heads: int) -> Pace:
    """The pace of a setting, with so many heads at hand."""
    return (
        Measured(n_heads)
        if draft == "auto" and n_heads
        else Steady(min(0 if draft == "auto" else draft, n_heads))
    )


@dataclass(slots=True)
class Lookahead:
    """Steps a session, several tokens at a time where drafts come true."""

    session: Session
    pace: Pace
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
