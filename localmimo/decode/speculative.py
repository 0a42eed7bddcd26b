"""Speculative steps: have the main model check drafted tokens in one pass, and decide how many to draft.

Knows sessions, logits and clocks; nothing of text, and nothing of how a token is drawn. A draft never changes what is
drawn: the logits after it are used only where the very token was drawn, and otherwise the draft is removed.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from localmimo.decode.draft_depth import DepthPolicy
from localmimo.decode.mtp import Choose
from localmimo.decode.session import Session
from localmimo.decode.steps import DraftStats
from localmimo.model.protocols import nothing_to_check


@dataclass(slots=True)
class SpeculativeSteps:
    """Steps a session, several tokens at a time where drafts are right."""

    session: Session
    depth_policy: DepthPolicy
    stats: DraftStats
    pages: Callable[[], int]  # pages that the experts used so far
    _drafts: deque[int] = field(default_factory=deque)  # appended to the session, not drawn yet
    _logits: Tensor | None = None  # after each token of the pass
    _row: int = 0
    _depth: int = 0
    _seconds: float = 0.0

    def advance(
        self, token: int, n_left: int, choose: Choose, check: Callable[[], None] = nothing_to_check
    ) -> Tensor:
        """The logits [vocab] after `token`, which was drawn. At most `n_left` more tokens follow it."""
        if self._drafts and self._drafts[0] == token:
            assert self._logits is not None
            self.stats.accepted[self._row] += 1
            self._drafts.popleft()
            self._row += 1
            return self._logits[self._row]
        self.settle()
        return self._pass(token, self._max_depth(n_left), choose, check)

    def settle(self) -> None:
        """Remove drafts that were not drawn: the session then holds the drawn tokens but the last."""
        if self._logits is None:
            return
        if self._drafts:
            self.session.rewind(len(self._drafts))
        self.depth_policy.record_pass(self._depth, self._seconds, self._row + 1)
        self._drafts.clear()
        self._logits = None

    def _max_depth(self, n_left: int) -> int:
        return max(0, min(n_left, self.session.context - self.session.position - 1, self.session.n_heads))

    def _pass(self, token: int, n_left: int, choose: Choose, check: Callable[[], None]) -> Tensor:
        began, pages = time.perf_counter(), self.pages()
        depth = min(self.depth_policy.depth(), n_left)
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
