"""Stopping: the rules that end an answer, and the search for stop strings in its text.

Knows text, deltas and counts. Must not know tokens, sessions or models.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from localmimo.chat.stream_parser import Delta
from localmimo.errors import BadRequest


@dataclass(frozen=True, slots=True)
class StopRules:
    """When to stop, and what to report."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    think_budget: int | None = None  # tokens of thinking before it is closed, its <think> among them
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


@dataclass(slots=True)
class AnswerStops:
    """Finds stop strings in the answer's text alone: neither in thinking nor in a call, nor across one of them.

    White space between thinking and the answer is not searched: with the stop string "\\n\\n", the blank line that
    models write after </think> would end every answer before its first word.
    """

    strings: Sequence[str]
    _stops: StopStrings = field(init=False)
    _thought: bool = False  # thinking came, and behind it only white space

    def __post_init__(self) -> None:
        self._stops = StopStrings(self.strings)

    @property
    def found(self) -> bool:
        """Whether the answer is over; from then on every delta is dropped."""
        return self._stops.found

    def push(self, deltas: Iterable[Delta]) -> list[Delta]:
        """The deltas that are certain now, in their order."""
        return [certain for delta in deltas for certain in self._certain(delta)]

    def flush(self) -> list[Delta]:
        """What was held back, the answer being at its end."""
        held = self._stops.flush()
        return [Delta("answer", held, raw=held)] if held else []

    def _certain(self, delta: Delta) -> Iterator[Delta]:
        if self.found:
            return
        if delta.kind != "answer":
            self._thought = delta.kind == "thinking"
            yield from self.flush()
            yield delta
            return
        space = len(delta.text) - len(delta.text.lstrip()) if self._thought else 0
        self._thought = self._thought and space == len(delta.text)
        text = delta.text[:space] + self._stops.push(delta.text[space:])
        if text:
            yield replace(delta, text=text)
