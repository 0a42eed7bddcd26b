"""The generation loop: read the prompt, draw tokens until a stop rule holds, yield Steps with their Stats.

Knows sessions, tokens and text; nothing of messages, templates, files or terminals.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from threading import Event
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from localmimo.chat import Delta, Kind, ToolCall
from localmimo.errors import BadRequest, Cancelled
from localmimo.experts.traffic import Traffic
from localmimo.sample import Sampling, logprobs, pick
from localmimo.session import Progress, Session
from localmimo.text import Decoder, Tokenizer

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "context"]


@dataclass(slots=True)
class Stats:
    """What one generation took so far; seconds are wall time, tokens are counts."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, already in the KV cache
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    pages_ram: int = 0  # expert pages found in RAM
    pages_disk: int = 0  # expert pages read from disk
    bytes_read: int = 0
    read_s: float = 0.0  # time in which the disk was being read
    prefetch_useful: int = 0  # pages read on a guess that were then asked for
    prefetch_wasted: int = 0  # pages read on a guess for nothing

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens read per second; 0 where nothing had to be read."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first; 0 before there are two."""
        return (
            (self.generated_tokens - 1) / self.decode_s
            if self.generated_tokens > 1 and self.decode_s
            else 0.0
        )

    @property
    def hits(self) -> dict[str, float]:
        """Share of expert pages by the tier they were found in."""
        pages = self.pages_ram + self.pages_disk
        return {"ram": self.pages_ram / pages, "disk": self.pages_disk / pages} if pages else {}

    def as_dict(self) -> dict[str, Any]:
        derived = {"prefill_tps": self.prefill_tps, "decode_tps": self.decode_tps, "hits": self.hits}
        return asdict(self) | derived


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of the answer. `finish_reason` is set on the last step alone, whose text is empty.

    `token` is the token that gave the text; where one token gives several steps, the first of them has it.
    """

    text: str
    token: int | None
    kind: Kind
    stats: Stats
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    tool_call: ToolCall | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """When to stop, and what to report."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    think_budget: int | None = None  # tokens of thinking before it is closed
    n_logprobs: int | None = None  # None: no log-probabilities; 0: of the drawn token alone

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadRequest(f"max tokens is {self.max_tokens}; it must be at least 1.")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise BadRequest("A stop string is empty; give at least one character.")


class Parser(Protocol):
    """Text pieces in, deltas out: StreamParser for a conversation, Verbatim for a bare text."""

    def push(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class Verbatim:
    """All of the text is the answer, tags included."""

    def push(self, text: str) -> list[Delta]:
        return [Delta("answer", text, raw=text)] if text else []

    def finish(self) -> list[Delta]:
        return []


@dataclass(slots=True)
class StopStrings:
    """Finds stop strings in a stream of text, also where they straddle tokens; holds back what may be one."""

    strings: Sequence[str]
    found: bool = False  # from then on every text is dropped
    _held: str = ""

    def push(self, text: str) -> str:
        """The text that is certain now."""
        self._held += "" if self.found else text
        starts = [at for string in self.strings if (at := self._held.find(string)) >= 0]
        if starts:
            self.found = True
            certain, self._held = self._held[: min(starts)], ""
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
class _Draw:
    """A drawn token with what is reported of it."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Generation:
    """One running answer: `run` yields its steps."""

    session: Session
    tokenizer: Tokenizer
    parser: Parser
    sampling: Sampling
    rules: Rules
    traffic: Callable[[], Traffic]
    cancel: Event = field(default_factory=Event)
    progress: Progress | None = None
    stats: Stats = field(default_factory=Stats)
    _kind: Kind = "answer"
    _called: bool = False
    _thought: int = 0  # tokens of thinking

    def run(self, prompt: Sequence[int]) -> Iterator[Step]:
        """Yield steps; the last one has a finish_reason. Raises ContextFull before anything is read."""
        began, before = time.perf_counter(), self.traffic().copy()
        self.stats.prompt_tokens = len(prompt)
        decoder, stops = Decoder(self.tokenizer), StopStrings(self.rules.stop)
        reason: FinishReason = "cancelled"
        try:
            for draw in self._draws(prompt, began, before):
                if draw.token in self.tokenizer.eos_ids:
                    reason = "stop"
                    break
                text = stops.push(decoder.push(draw.token))
                yield from self._steps(self.parser.push(text), draw)
                if stops.found or self.stats.generated_tokens == self.rules.max_tokens:
                    reason = "stop" if stops.found else "length"
                    break
            else:
                reason = "context"
        except Cancelled:
            pass
        self._count(before)
        yield from self._last(stops.push(decoder.flush()) + stops.flush(), reason)

    def _draws(self, prompt: Sequence[int], began: float, before: Traffic) -> Iterator[_Draw]:
        """Read the prompt, then draw tokens until the context is full."""
        generator = _generator(self.sampling.seed)
        logits = self.session.sync(prompt, self.progress, self._check)
        self.stats.reused_tokens = self.session.n_reused
        self.stats.prefill_s = time.perf_counter() - began
        seen = list(prompt)
        while True:
            draw = self._draw(logits, seen, generator)
            seen.append(draw.token)
            self.stats.generated_tokens += 1
            self._clock(began, before)
            yield draw
            if self.session.position >= self.session.context:
                return
            logits = self.session.step(draw.token, self._check)

    def _draw(self, logits: Tensor, seen: Sequence[int], generator: torch.Generator) -> _Draw:
        token = self._end_of_thinking()
        token = pick(logits, self.sampling, seen, generator) if token is None else token
        if self.rules.n_logprobs is None:
            return _Draw(token)
        logprob, top = logprobs(logits, token, self.rules.n_logprobs)
        return _Draw(token, logprob, tuple(top))

    def _end_of_thinking(self) -> int | None:
        """The token that closes a thinking block whose budget is spent."""
        budget = self.rules.think_budget
        if budget is None or self._kind != "thinking" or self._thought < budget:
            return None
        return self.tokenizer.token_id("</think>")

    def _check(self) -> None:
        if self.cancel.is_set():
            raise Cancelled("The generation was stopped.")

    def _clock(self, began: float, before: Traffic) -> None:
        now = time.perf_counter() - began
        if self.stats.generated_tokens == 1:
            self.stats.first_token_s = now
        self.stats.decode_s = now - self.stats.first_token_s
        self._count(before)

    def _count(self, before: Traffic) -> None:
        traffic = self.traffic().since(before)
        self.stats.pages_ram, self.stats.pages_disk = traffic.ram_pages, traffic.disk_pages
        self.stats.bytes_read, self.stats.read_s = traffic.disk_bytes, traffic.read_s
        self.stats.prefetch_useful = traffic.prefetch_useful
        self.stats.prefetch_wasted = traffic.prefetch_wasted

    def _steps(self, deltas: list[Delta], draw: _Draw) -> Iterator[Step]:
        """One step per delta; a token that gives no text yet gives an empty step."""
        for delta in deltas:
            self._kind = delta.kind
            self._called |= delta.tool_call is not None
        self._thought += self._kind == "thinking"
        first, *others = deltas or [Delta(self._kind, "")]
        yield Step(first.text, draw.token, first.kind, self.stats, draw.logprob, draw.top, first.tool_call)
        for delta in others:
            yield Step(delta.text, None, delta.kind, self.stats, tool_call=delta.tool_call)

    def _last(self, rest: str, reason: FinishReason) -> Iterator[Step]:
        for delta in [*self.parser.push(rest), *self.parser.finish()]:
            self._called |= delta.tool_call is not None
            yield Step(delta.text, None, delta.kind, self.stats, tool_call=delta.tool_call)
        reason = "tool_calls" if self._called and reason == "stop" else reason
        yield Step("", None, self._kind, self.stats, finish_reason=reason)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
