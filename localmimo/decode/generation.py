"""The generation loop: read the prompt, draw tokens until a stop rule holds, yield Steps with their Stats.

Knows sessions, tokens and text; nothing of messages, templates, files or terminals.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Protocol

import torch
from torch import Tensor

from localmimo.chat.stream_parser import THINK, THINK_END, Delta, Kind
from localmimo.chat.tokenizer import Decoder, Tokenizer
from localmimo.decode.draft_depth import DepthPolicy, FixedDepth
from localmimo.decode.options import Sampling
from localmimo.decode.sampler import logprobs, pick
from localmimo.decode.session import Progress, Session
from localmimo.decode.speculative import SpeculativeSteps
from localmimo.decode.steps import FinishReason, Stats, Step
from localmimo.decode.stopping import AnswerStops, StopRules
from localmimo.errors import Cancelled
from localmimo.experts.store.counters import PageCounters
from localmimo.limits import MAX_DRAFTS
from quant import kernels


class Parser(Protocol):
    """Text pieces in, deltas out: StreamParser for a conversation, PlainTextParser for a bare text."""

    @property
    def thinking(self) -> bool:
        """Whether the text pushed so far ends inside a thinking block."""

    @property
    def in_call(self) -> bool:
        """Whether it ends inside what is a call or may become one."""

    def push(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class PlainTextParser:
    """All of the text is the answer, tags included."""

    thinking = in_call = False

    def push(self, text: str) -> list[Delta]:
        return [Delta("answer", text, raw=text)] if text else []

    def finish(self) -> list[Delta]:
        return []


class Constraint(Protocol):
    """What an answer must look like: a grammar's state along one answer."""

    @property
    def thinking(self) -> bool:
        """Whether the next token is one of thinking, or the tag that closes it."""

    def end_thinking(self) -> None:
        """The thinking is over, though no token of </think> was drawn: it was spelled, or a call ended it."""

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [vocab] with minus infinity where a token cannot follow."""

    def accept(self, token: int) -> None:
        """`token` was drawn."""

    def allowed(self, logits: Tensor, drafts: Sequence[int]) -> Tensor:
        """`mask` as it would be after the drafts; the state stays."""


@dataclass(slots=True)
class _Draw:
    """A drawn token with what is reported of it."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Generation:
    """One running answer: `run` yields its steps; or `begin`, then `take` and a step of the session in turns.

    The latter is for several generations that go on together; `end` gives the last step.
    """

    session: Session
    tokenizer: Tokenizer
    parser: Parser
    sampling: Sampling
    rules: StopRules
    counters: Callable[[], PageCounters]
    cancel: Event = field(default_factory=Event)
    progress: Progress | None = None
    depth_policy: DepthPolicy = field(default_factory=lambda: FixedDepth(0))
    constraint: Constraint | None = None
    stats: Stats = field(default_factory=Stats)
    reason: FinishReason | None = None  # why it is over; None while it goes on
    token: int = -1  # the last one drawn, which the session does not hold yet
    _seen: list[int] = field(default_factory=list)
    _seed: int = 0
    _began: float = 0.0
    _before: PageCounters = field(default_factory=PageCounters)
    _kind: Kind = "answer"
    _called: bool = False
    _answered: bool = False  # more came than thinking and white space
    _thought: int = 0  # tokens of thinking
    _decoder: Decoder = field(init=False)
    _stops: AnswerStops = field(init=False)

    def __post_init__(self) -> None:
        self._decoder, self._stops = Decoder(self.tokenizer), AnswerStops(self.rules.stop)

    def run(self, prompt: Sequence[int]) -> Iterator[Step]:
        """Yield steps; the last one has a finish_reason. Raises ContextFull before anything is read."""
        speculative = SpeculativeSteps(self.session, self.depth_policy, self.stats.drafts, self._pages)
        try:
            logits = self.begin(prompt)
            while True:
                yield from self.take(logits)
                if self.reason is not None:
                    break
                self.check()  # tokens that were drafted come without a pass
                logits = speculative.advance(self.token, self._n_wanted(), self._draw_draft, self.check)
        except Cancelled:
            self.reason = "cancelled"
        finally:
            speculative.settle()
            self.session.checkpoint()
        yield from self.end()

    def begin(self, prompt: Sequence[int]) -> Tensor:
        """Read the prompt; the logits [vocab] after it."""
        self._began, self._before = time.perf_counter(), self.counters().copy()
        self._seen, self._seed = list(prompt), self.sampling.new_seed()
        self.stats.prompt_tokens = len(prompt)
        logits = self.session.sync(prompt, self.progress, self.check)
        self.stats.reused_tokens = self.session.n_reused
        self.stats.prefill_s = time.perf_counter() - self._began
        return logits

    @kernels.alone()
    def take(self, logits: Tensor) -> list[Step]:
        """Draw the next token: `token` and the steps it gives; sets `reason` where it is the last."""
        draw = self._draw(logits)
        self.token = draw.token
        self._seen.append(draw.token)
        self.stats.generated_tokens += 1
        self._clock()
        if draw.token in self.tokenizer.eos_ids:
            self.reason = "stop"
            return []
        if self.constraint is not None:
            self.constraint.accept(draw.token)
        deltas = self.parser.push(self._decoder.push(draw.token))
        self._follow_thinking()
        steps = self._steps(self._stops.push(deltas), draw)
        self.reason = self._limit()
        return steps

    def end(self) -> Iterator[Step]:
        """What is still held back, then the last step."""
        self._count()
        rest = [*self.parser.push(self._decoder.flush()), *self.parser.finish()]
        for delta in [*self._stops.push(rest), *self._stops.flush()]:
            self._called |= delta.tool_call is not None
            yield self._step(delta)
        if self._stops.found and self.reason in ("length", "context"):
            self.reason = "stop"
        if self._called and self.reason == "stop":
            self.reason = "tool_calls"
        yield Step("", None, self._kind, self.stats, finish_reason=self.reason)

    def check(self) -> None:
        """Raise Cancelled where somebody asked for it: called between layers."""
        if self.cancel.is_set():
            raise Cancelled("The generation was stopped.")

    def _limit(self) -> FinishReason | None:
        """Why no further token can come, None where one can."""
        if self._stops.found or (self._called and self.rules.one_call):
            return "stop"
        if self.stats.generated_tokens == self.rules.max_tokens:
            return "length"
        return "context" if len(self._seen) > self.session.context else None

    def _n_wanted(self) -> int:
        """How many tokens may still come after the next one."""
        most = self.rules.max_tokens
        return MAX_DRAFTS if most is None else most - self.stats.generated_tokens - 1

    def _draw(self, logits: Tensor) -> _Draw:
        token = self._end_of_thinking()
        if token is None:
            shown = logits if self.constraint is None else self.constraint.mask(logits)
            shown = self._without_more_thinking(shown)
            token = pick(shown, self.sampling, self._seen, self._seed, len(self._seen))
        if self.rules.n_logprobs is None:
            return _Draw(token)
        logprob, top = logprobs(logits, token, self.rules.n_logprobs)
        return _Draw(token, logprob, tuple(top))

    def _draw_draft(self, logits: Tensor, drafts: Sequence[int]) -> int:
        """The token that a draft head's logits would give: drawn like any other, so that it often is the same."""
        if self.constraint is not None:
            logits = self.constraint.allowed(logits, drafts)
        seen = [*self._seen, *drafts] if self.sampling.counts_tokens else self._seen
        return pick(logits, self.sampling, seen, self._seed, len(self._seen) + len(drafts))

    def _end_of_thinking(self) -> int | None:
        """The token that closes a thinking block whose budget is spent."""
        in_thinking = self.parser.thinking and not self.parser.in_call
        in_thinking = in_thinking and (self.constraint is None or self.constraint.thinking)
        return self.tokenizer.token_id(THINK_END) if in_thinking and self._is_budget_spent() else None

    def _without_more_thinking(self, logits: Tensor) -> Tensor:
        """Logits in which a thinking block that the budget closed is not opened again, right behind its end."""
        token = self.tokenizer.token_id(THINK)
        if token is None or not self._thought or self._answered or not self._is_budget_spent():
            return logits
        return logits.index_fill(0, torch.tensor([token]), float("-inf"))

    def _is_budget_spent(self) -> bool:
        return self.rules.think_budget is not None and self._thought >= self.rules.think_budget

    def _follow_thinking(self) -> None:
        """Count a token of thinking, and let the constraint begin where thinking is over: the parser decides."""
        if self.parser.thinking:  # also in a call that may be text in the end
            self._thought += 1
        elif self._thought and self.constraint is not None and self.constraint.thinking:
            self.constraint.end_thinking()

    def _pages(self) -> int:
        return self.counters().n_pages

    def _clock(self) -> None:
        now = time.perf_counter() - self._began
        if self.stats.generated_tokens == 1:
            self.stats.first_token_s = now
        self.stats.decode_s = now - self.stats.first_token_s
        self._count()

    def _count(self) -> None:
        counters = self.counters().since(self._before)
        self.stats.pages_gpu = counters.gpu_pages
        self.stats.pages_ram, self.stats.pages_disk = counters.ram_pages, counters.disk_pages
        self.stats.bytes_read, self.stats.read_s = counters.disk_bytes, counters.read_s
        self.stats.prefetch_useful = counters.prefetch_useful
        self.stats.prefetch_wasted = counters.prefetch_wasted

    def _steps(self, deltas: list[Delta], draw: _Draw) -> list[Step]:
        """One step per delta; a token that gives no text yet gives an empty step."""
        for delta in deltas:
            self._kind = delta.kind
            self._called |= delta.tool_call is not None
            self._answered |= delta.kind != "thinking" and not delta.text.isspace()
        first, *others = deltas or [Delta(self._next_kind, "")]
        return [self._step(first, draw.token, draw.logprob, draw.top), *map(self._step, others)]

    @property
    def _next_kind(self) -> Kind:
        """What a token without text belongs to: the answer, where thinking was just closed."""
        if self._kind == "thinking" and not self.parser.thinking:
            return "answer"
        return self._kind

    def _step(
        self,
        delta: Delta,
        token: int | None = None,
        logprob: float | None = None,
        top: tuple[tuple[int, float], ...] = (),
    ) -> Step:
        return Step(
            delta.text, token, delta.kind, self.stats, logprob, top,
            tool_call=delta.tool_call, call_part=delta.part,
        )  # fmt: skip
