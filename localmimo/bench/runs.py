"""Measure: how fast an engine reads and answers at given depths of context, and what each tier gave meanwhile.

A run reads one prompt and answers it, token by token, the likeliest one each time; drawing it is timed along, and
drafts are made as in any answer. Where the corpus is no text the answer follows the corpus: what a random model would
say goes round in circles, and its experts with it. Knows engines and clocks; no files, no terminal.
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
from localmimo.experts.store.counters import PageCounters

if TYPE_CHECKING:
    from torch import Tensor

    from localmimo.decode.session import Session
    from localmimo.engine import Engine

TRAFFIC = tuple(PageCounters.__dataclass_fields__)
WARM_UP = -1  # the corpus's seed of what is not counted

Write = Callable[[int, int, Sequence[int]], None]  # step, layer, experts of one token


@dataclass(frozen=True, slots=True)
class BenchJob:
    """What to measure."""

    depths: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int  # of an answer; the first one comes with the prompt
    repeat: int
    cold: bool = False  # each run opens the pack anew and reads the depth along with the prompt

    @property
    def positions(self) -> int:
        """The context that this needs."""
        return max(self.depths) + self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a prompt or a token of an answer took. A token that a draft foresaw takes next to nothing."""

    tokens: int
    seconds: float
    traffic: PageCounters


@dataclass(slots=True)
class BenchRun:
    """A prompt and its answer, as far as it went."""

    depth: int
    number: int
    prompt: StepCost
    first_token_s: float
    drafts: DraftStats
    steps: list[StepCost] = field(default_factory=list)
    peak_bytes: int = 0  # of the process, so far
    n_slots: int = 0  # in use at the end

    def line(self, taken: StepCost) -> dict[str, Any]:
        """A prompt or the last step, on its own."""
        step = len(self.steps)
        where = {
            "depth": self.depth,
            "run": self.number,
            "phase": "decode" if step else "prefill",
            "step": step,
        }
        return where | {"tokens": taken.tokens, "seconds": taken.seconds} | asdict(taken.traffic)


class BenchObserver(Protocol):
    """Is told how it goes, outside of what is timed but for `reading`."""

    def opened(self, engine: Engine, corpus: Corpus) -> None: ...

    def reading(self, depth: int, done: int, total: int) -> None: ...

    def took(self, run: BenchRun, taken: StepCost) -> None: ...


class Bench:
    """Carries out a job. `runs` has what was measured so far, also after an interrupt."""

    def __init__(
        self,
        job: BenchJob,
        open_engine: Callable[[], Engine],
        watch: BenchObserver,
        write: Write | None = None,
    ) -> None:
        self.job = job
        self.runs: list[BenchRun] = []
        self.library_bytes = 0  # what interpreter and libraries take before the pack is opened
        self._open_engine = open_engine
        self._watch = watch
        self._recorder = None if write is None else TraceRecorder(write)

    def run(self) -> Iterator[int]:
        """Measure; yields each depth when it is done."""
        self.library_bytes = _library_bytes()
        return self._cold() if self.job.cold else self._warm()

    def runs_at(self, depth: int) -> list[BenchRun]:
        return [run for run in self.runs if run.depth == depth]

    def _warm(self) -> Iterator[int]:
        job = self.job
        with self._open_engine() as engine, engine.session() as session:
            bench = self._timeline(engine, session)
            bench.warm_up(
                bench.corpus.stretch(WARM_UP, job.prompt_tokens + job.max_tokens), job.prompt_tokens
            )
            text = bench.corpus.stretch(0, max(job.depths))
            for depth in job.depths:
                if depth:
                    bench.read(text[:depth], depth)
                for number in range(job.repeat):
                    session.rewind(session.position - depth)
                    self._measure(bench, depth, number, text[:depth])
                yield depth

    def _cold(self) -> Iterator[int]:
        for depth in self.job.depths:
            for number in range(self.job.repeat):
                with self._open_engine() as engine, engine.session() as session:
                    bench = self._timeline(engine, session)
                    self._measure(bench, depth, number, bench.corpus.stretch(0, depth))
            yield depth

    def _timeline(self, engine: Engine, session: Session) -> TimedSession:
        corpus = Corpus.open(lambda: engine.tokenizer, engine.config.vocab_size)
        self._watch.opened(engine, corpus)
        return TimedSession(engine, session, corpus, self._watch)

    def _measure(self, bench: TimedSession, depth: int, number: int, before: list[int]) -> None:
        """One run: another prompt each time, after the same tokens."""
        n, seed = self.job.prompt_tokens, 1 + len(self.runs)
        words = bench.corpus.stretch(seed, n + self.job.max_tokens)
        token, prompt = bench.timed(lambda: bench.read([*before, *words[:n]], depth))
        run = BenchRun(depth, number, prompt, prompt.seconds, DraftStats())
        run.peak_bytes, run.n_slots = peak_bytes(), bench.engine.n_slots
        self.runs.append(run)
        self._watch.took(run, prompt)
        for taken in bench.steps(token, words[n:], run.drafts, self._recorder):
            run.steps.append(taken)
            self._watch.took(run, taken)
        run.peak_bytes, run.n_slots = peak_bytes(), bench.engine.n_slots


@dataclass(frozen=True, slots=True)
class TimedSession:
    """An engine's session, and the clock beside it."""

    engine: Engine
    session: Session
    corpus: Corpus
    watch: BenchObserver

    def read(self, tokens: list[int], depth: int) -> Tensor:
        """Take the session to these tokens; the likeliest next one [1]."""
        logits = self.session.sync(tokens, lambda done, total: self.watch.reading(depth, done, total))
        return logits.argmax()

    def timed(self, work: Callable[[], Tensor]) -> tuple[int, StepCost]:
        """The token that some work gives, and what it took."""
        held, before, began = self.session.position, self.engine.traffic, perf_counter()
        token = int(work())
        seconds = perf_counter() - began
        traffic = self.engine.traffic.since(before)
        return token, StepCost(self.session.position - held, seconds, traffic)

    def warm_up(self, words: list[int], n: int) -> None:
        """A prompt of n words and an answer that do not count."""
        for _ in self.steps(int(self.read(words[:n], 0)), words[n:], DraftStats(), None):
            pass

    def steps(
        self, token: int, words: Sequence[int], drafts: DraftStats, recorder: TraceRecorder | None
    ) -> Iterator[StepCost]:
        """Say as many tokens as there are words, `token` first; yields what each after the first took."""
        ahead = self.engine.ahead(self.session, drafts)
        try:
            for n, word in enumerate(words[:-1]):
                said = token if self.corpus.is_text else word
                room = len(words) - 2 - n  # tokens that may still come after the next one
                with self._recorded(recorder):
                    token, taken = self.timed(partial(_advance, ahead, said, room))
                yield replace(taken, tokens=1)
        finally:
            ahead.settle()

    @contextmanager
    def _recorded(self, recorder: TraceRecorder | None) -> Iterator[None]:
        if recorder is None:
            yield
            return
        self.engine.record(recorder.hear)
        try:
            yield
        finally:
            self.engine.record(None)
        recorder.write()


def _advance(ahead: SpeculativeSteps, said: int, room: int) -> Tensor:
    return ahead.advance(said, room, lambda logits, drafts: int(logits.argmax())).argmax()


class TraceRecorder:
    """Turns what layers choose, one after the other, into lines token by token; for answers without drafts."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._choices: list[tuple[int, list[list[int]]]] = []
        self._step = 0

    def hear(self, layer: int, chosen: Tensor) -> None:
        """Experts [n, k] of n tokens in a layer."""
        self._choices.append((layer, chosen.tolist()))

    def write(self) -> None:
        """Give out the step that was heard."""
        n = len(self._choices[0][1])
        for row in range(n):
            for layer, chosen in self._choices:
                self._write(self._step + row, layer, chosen[row])
        self._step += n
        self._choices.clear()


# ---- figures ----


def figures(depth: int, runs: Sequence[BenchRun]) -> dict[str, Any]:
    """What the runs at one depth gave; runs that were cut short count as far as they went."""
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
    """Tokens that were drafted, and how many of them were then said."""
    drafted, accepted = (sum(sum(getattr(it, name)) for it in stats) for name in ("drafted", "accepted"))
    passes = sum(it.passes for it in stats)
    share = accepted / drafted if drafted else None
    return {"passes": passes, "drafted": drafted, "accepted": accepted, "acceptance": share}


def tier_figures(taken: Sequence[StepCost]) -> dict[str, Any]:
    """What the tiers gave: totals, and what follows from them."""
    total = {name: sum(getattr(it.traffic, name) for it in taken) for name in TRAFFIC}
    n_tokens = sum(it.tokens for it in taken)
    return {
        "n_tokens": n_tokens,
        **total,
        "disk_bytes_per_token": total["disk_bytes"] / n_tokens if n_tokens else None,
        "disk_read": total["disk_bytes"] / total["read_s"] if total["read_s"] else None,
        "hits": hits(total["gpu_pages"], total["ram_pages"], total["disk_pages"]),
    }


def hits(gpu: int, ram: int, disk: int) -> dict[str, float]:
    """Share of expert requests by the tier that answered them; a GPU only where there is one in use."""
    pages = gpu + ram + disk
    tiers = {"gpu": gpu, "ram": ram, "disk": disk}
    return {tier: n / pages for tier, n in tiers.items() if pages and (n or tier != "gpu")}


# ---- memory ----


def _library_bytes() -> int:
    """Resident memory with the libraries at work, before a pack is opened."""
    import torch

    import localmimo.engine  # noqa: F401  (so that it counts)

    torch.randn(256, 256) @ torch.randn(
        256, 256
    )  # the maths library takes its own memory at the first product
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most memory that was resident so far."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
