"""Measured runs of an engine: its speed at given depths of context, and what each tier delivered.

A run reads one prompt and answers it token by token, each time with the likeliest token. The choice of the token is
timed too, and drafts are made as in any answer. Where the corpus is not text, the answer is the corpus itself: a random
model would repeat itself, and its experts with it. Knows engines and clocks; no files, no terminal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from localmimo.bench.corpus import Corpus
from localmimo.decode.speculative import SpeculativeSteps
from localmimo.decode.steps import DraftStats
from localmimo.experts.store.counters import PageCounters, hit_shares
from localmimo.limits import TIERS

if TYPE_CHECKING:
    from torch import Tensor

    from localmimo.decode.session import Session
    from localmimo.engine import Engine

COUNTERS = tuple(PageCounters.__dataclass_fields__)
WARM_UP_SEED = -1  # of the corpus, for the tokens that are not measured

WriteChoice = Callable[[int, int, Sequence[int]], None]  # (step, layer, experts of one token)


@dataclass(frozen=True, slots=True)
class BenchJob:
    """What to measure."""

    depths: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int  # of an answer; the first one comes with the prompt
    repeat: int
    cold: bool = False  # each run opens the pack again and reads the context before the prompt too

    @property
    def positions(self) -> int:
        """Tokens of context that this needs."""
        return max(self.depths) + self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class StepCost:
    """The cost of a prompt or of one token of an answer. A token that a draft predicted costs almost nothing."""

    tokens: int
    seconds: float
    counters: PageCounters  # what the tiers delivered meanwhile


@dataclass(slots=True)
class BenchRun:
    """A prompt and its answer, as far as they were measured."""

    depth: int
    number: int
    prompt: StepCost
    first_token_s: float
    drafts: DraftStats
    steps: list[StepCost] = field(default_factory=list)
    peak_bytes: int = 0  # of the process, so far
    n_slots: int = 0  # in use at the end

    def as_dict(self, cost: StepCost) -> dict[str, Any]:
        """The prompt or the last step as JSON."""
        step = len(self.steps)
        position = {
            "depth": self.depth,
            "run": self.number,
            "phase": "decode" if step else "prefill",
            "step": step,
        }
        return position | {"tokens": cost.tokens, "seconds": cost.seconds} | asdict(cost.counters)


class BenchObserver(Protocol):
    """Receives the progress. Only `on_read` is called while the clock runs."""

    def on_open(self, engine: Engine, corpus: Corpus) -> None: ...

    def on_read(self, depth: int, done: int, total: int) -> None: ...

    def on_step(self, run: BenchRun, cost: StepCost) -> None: ...


class Bench:
    """Runs a job. `runs` holds what was measured so far, also after an interrupt."""

    def __init__(
        self,
        job: BenchJob,
        open_engine: Callable[[], Engine],
        observer: BenchObserver,
        write: WriteChoice | None = None,
    ) -> None:
        self.job = job
        self.runs: list[BenchRun] = []
        self.library_bytes = 0  # resident memory before the pack is opened
        self._open_engine = open_engine
        self._observer = observer
        self._recorder = None if write is None else TraceRecorder(write)

    def run(self) -> Iterator[int]:
        """Measure. Yields each depth when it is done."""
        self.library_bytes = _library_bytes()
        return self._cold() if self.job.cold else self._warm()

    def runs_at(self, depth: int) -> list[BenchRun]:
        return [run for run in self.runs if run.depth == depth]

    def _warm(self) -> Iterator[int]:
        job = self.job
        with self._open_engine() as engine, engine.session() as session:
            timed = self._timed(engine, session)
            timed.warm_up(
                timed.corpus.tokens(WARM_UP_SEED, job.prompt_tokens + job.max_tokens), job.prompt_tokens
            )
            context = timed.corpus.tokens(0, max(job.depths))
            for depth in job.depths:
                if depth:
                    timed.read(context[:depth], depth)
                for number in range(job.repeat):
                    session.rewind(session.position - depth)
                    self._measure(timed, depth, number, context[:depth])
                yield depth

    def _cold(self) -> Iterator[int]:
        for depth in self.job.depths:
            for number in range(self.job.repeat):
                with self._open_engine() as engine, engine.session() as session:
                    timed = self._timed(engine, session)
                    self._measure(timed, depth, number, timed.corpus.tokens(0, depth))
            yield depth

    def _timed(self, engine: Engine, session: Session) -> TimedSession:
        corpus = Corpus.open(lambda: engine.tokenizer, engine.config.vocab_size)
        self._observer.on_open(engine, corpus)
        return TimedSession(engine, session, corpus, self._observer)

    def _measure(self, timed: TimedSession, depth: int, number: int, context: list[int]) -> None:
        """One run, with a prompt of its own behind the same context."""
        n, seed = self.job.prompt_tokens, 1 + len(self.runs)
        tokens = timed.corpus.tokens(seed, n + self.job.max_tokens)
        token, prompt = timed.cost(lambda: timed.read([*context, *tokens[:n]], depth))
        run = BenchRun(depth, number, prompt, prompt.seconds, DraftStats())
        run.peak_bytes, run.n_slots = peak_bytes(), timed.engine.n_slots
        self.runs.append(run)
        self._observer.on_step(run, prompt)
        for cost in timed.steps(token, tokens[n:], run.drafts, self._recorder):
            run.steps.append(cost)
            self._observer.on_step(run, cost)
        run.peak_bytes, run.n_slots = peak_bytes(), timed.engine.n_slots


@dataclass(frozen=True, slots=True)
class TimedSession:
    """An engine's session whose work is timed."""

    engine: Engine
    session: Session
    corpus: Corpus
    observer: BenchObserver

    def read(self, tokens: list[int], depth: int) -> Tensor:
        """Read these tokens into the session; the likeliest next one [1]."""
        logits = self.session.sync(tokens, lambda done, total: self.observer.on_read(depth, done, total))
        return logits.argmax()

    def cost(self, work: Callable[[], Tensor]) -> tuple[int, StepCost]:
        """The token that `work` returns, and what the work cost."""
        position, before, start_s = self.session.position, self.engine.counters, perf_counter()
        token = int(work())
        seconds = perf_counter() - start_s
        counters = self.engine.counters.since(before)
        return token, StepCost(self.session.position - position, seconds, counters)

    def warm_up(self, tokens: list[int], n: int) -> None:
        """A prompt of n tokens and an answer that are not measured."""
        for _ in self.steps(int(self.read(tokens[:n], 0)), tokens[n:], DraftStats(), None):
            pass

    def steps(
        self, token: int, tokens: Sequence[int], drafts: DraftStats, recorder: TraceRecorder | None
    ) -> Iterator[StepCost]:
        """Answer with `token` and as many tokens as `tokens` has after its first; yields the cost of each of these."""
        ahead = self.engine.speculative_steps(self.session, drafts)
        try:
            for n, corpus_token in enumerate(tokens[:-1]):
                answered = token if self.corpus.is_text else corpus_token
                n_left = len(tokens) - 2 - n  # after the next one
                with self._recorded(recorder):
                    token, cost = self.cost(partial(_advance, ahead, answered, n_left))
                yield replace(cost, tokens=1)
        finally:
            ahead.settle()

    @contextmanager
    def _recorded(self, recorder: TraceRecorder | None) -> Iterator[None]:
        if recorder is None:
            yield
            return
        self.engine.record(recorder.add)
        try:
            yield
        finally:
            self.engine.record(None)
        recorder.write()


def _advance(ahead: SpeculativeSteps, token: int, n_left: int) -> Tensor:
    """The likeliest token after this one [1]."""
    return ahead.advance(token, n_left, lambda logits, drafts: int(logits.argmax())).argmax()


class TraceRecorder:
    """Collects the experts that each layer chooses and writes them token by token. For answers without drafts."""

    def __init__(self, write: WriteChoice) -> None:
        self._write = write
        self._choices: list[tuple[int, list[list[int]]]] = []
        self._step = 0

    def add(self, layer: int, chosen: Tensor) -> None:
        """The experts [n, k] that a layer chose for n tokens."""
        self._choices.append((layer, chosen.tolist()))

    def write(self) -> None:
        """Write the choices of one step, and forget them."""
        n = len(self._choices[0][1])
        for row in range(n):
            for layer, chosen in self._choices:
                self._write(self._step + row, layer, chosen[row])
        self._step += n
        self._choices.clear()


# ---- figures ----


def figures(depth: int, runs: Sequence[BenchRun]) -> dict[str, Any]:
    """The figures of the runs at one depth. A run that was cut short counts as far as it was measured."""
    prefill = [run.prompt.tokens / run.prompt.seconds for run in runs]
    decode = [len(run.steps) / sum(step.seconds for step in run.steps) for run in runs if run.steps]
    steps = [step for run in runs for step in run.steps]
    return {
        "depth": depth,
        "n_runs": len(runs),
        "prompt_tokens": runs[0].prompt.tokens,
        **_spread("prefill_tps", prefill),
        **_spread("decode_tps", decode),
        "first_token_s": fmean(run.first_token_s for run in runs),
        "step_s_median": median(step.seconds for step in steps) if steps else None,
        "step_s_max": max((step.seconds for step in steps), default=None),
        "prefill": tier_figures([run.prompt for run in runs]),
        "decode": tier_figures(steps),
        "drafts": _drafts([run.drafts for run in runs]),
        "peak_rss_bytes": max(run.peak_bytes for run in runs),
        "n_slots": min(run.n_slots for run in runs),
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and the values themselves."""
    return {
        name: fmean(values) if values else None,
        f"{name}_sd": stdev(values) if len(values) > 1 else None,
        f"{name}_runs": list(values),
    }


def _drafts(stats: Sequence[DraftStats]) -> dict[str, Any]:
    """How many tokens were drafted, and how many of them were accepted."""
    drafted = sum(sum(run.drafted) for run in stats)
    accepted = sum(sum(run.accepted) for run in stats)
    passes = sum(run.passes for run in stats)
    share = accepted / drafted if drafted else None
    return {"passes": passes, "drafted": drafted, "accepted": accepted, "acceptance": share}


def tier_figures(costs: Sequence[StepCost]) -> dict[str, Any]:
    """What the tiers delivered: totals, bytes per token, the disk's bytes per second, hit rates."""
    total = {name: sum(getattr(cost.counters, name) for cost in costs) for name in COUNTERS}
    n_tokens = sum(cost.tokens for cost in costs)
    return {
        "n_tokens": n_tokens,
        **total,
        "disk_bytes_per_token": total["disk_bytes"] / n_tokens if n_tokens else None,
        "disk_read": total["disk_bytes"] / total["read_s"] if total["read_s"] else None,
        "hits": hit_shares({tier: total[f"{tier}_pages"] for tier in TIERS}),
    }


# ---- memory ----


def _library_bytes() -> int:
    """Resident memory once the libraries have worked, before a pack is opened."""
    import torch

    import localmimo.engine  # noqa: F401  (its imports count too)

    square = torch.randn(256, 256)
    torch.mm(square, square)  # the first product makes the maths library allocate its memory
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The process's peak of resident memory so far."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
