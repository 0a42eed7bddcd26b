"""Stopping: the rules that end an answer, and the search for stop strings in its text.

Knows text and counts. Must not know tokens, sessions or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from localmimo.errors import BadRequest


@dataclass(frozen=True, slots=True)
class StopRules:
    """When to stop, and what to report."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    think_budget: int | None = None  # tokens of thinking before it is closed
    n_logprobs: int | None = None  # None: no log-probabilities; 0: of the drawn token alone
    one_call: bool = False  # the first tool call ends the answer

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadRequest(f"max tokens is {self.max_tokens}; it must be at least 1.")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise BadRequest("A stop string is empty; give at least one character.")


@dataclass(slots=True)
class StopStrings:
    """Finds stop strings in a stream of text, also where they straddle tokens; holds back what may be one.

    The one that is complete first counts, the longer one of two that end together, however the text is cut.
    """

    strings: Sequence[str]
    found: bool = False  # from then on every text is dropped
    _held: str = ""

    def push(self, text: str) -> str:
        """The text that is certain now."""
        self._held += "" if self.found else text
        ends = [(at + len(s), at) for s in self.strings if (at := self._held.find(s)) >= 0]
        if ends:
            self.found = True
            certain, self._held = self._held[: min(ends)[1]], ""
            return certain
        return self._take(
            len(self._held) - max((self._overlap(string) for string in self.strings), default=0)
        )

    def flush(self) -> str:
        """What was held back, the stream being at its end."""
        return self._take(len(self._held))

    def _overlap(self, string: str) -> int:
        """How much of the end of the held text may be the beginning of `string`."""
        longest = min(len(string) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)

    def _take(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text
