"""Whether anything grows: chat, cancelled answers, saving and loading on the embedded model, in one process.

    python -m benchmarks.soak [--minutes 60] [--seed 0]

Prints JSON: what was done; resident memory, threads and file descriptors early and at the end; tokens per second of
the same probe in the first and the last fifth (a busy machine shows in both).
"""

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from localmimo import load
from localmimo.engine import Engine
from localmimo.sample import Sampling

PROBE = "Once upon a time"
PROBE_TOKENS = 24
WARM_UP = 0.2  # the share of the time in which memory may still be taken for the first time


@dataclass(frozen=True, slots=True)
class Mark:
    """What the process holds, and how fast it is."""

    at_s: float
    rss_bytes: int
    threads: int
    files: int
    probe_tps: float


class Soak:
    """One engine and one conversation, treated at random."""

    def __init__(self, engine: Engine, folder: Path, seed: int) -> None:
        self.engine = engine
        self.folder = folder
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.messages: list[dict[str, Any]] = []
        self.probes: set[str] = set()
        self.acts: tuple[Callable[[], None], ...] = (
            self.chat, self.chat, self.cancel, self.close, self.save, self.load,
        )  # fmt: skip

    def act(self) -> None:
        chosen = self.random.choice(self.acts)
        chosen()
        self.done[chosen.__name__] += 1

    def chat(self) -> None:
        """One turn more; a conversation ends after a few."""
        if len(self.messages) >= 8:
            self.messages = []
        self.messages.append(
            {"role": "user", "content": f"Tell me about number {self.random.randrange(1000)}."}
        )
        said = self.engine.chat(self.messages, max_tokens=16, sampling=self._sampling())
        self.messages.append({"role": "assistant", "content": said.content or "."})

    def cancel(self) -> None:
        """An answer that another thread stops, perhaps before it begins."""
        stop = threading.Event()
        timer = threading.Timer(self.random.uniform(0, 0.1), stop.set)
        timer.start()
        for _ in self.engine.stream("One two three", max_tokens=64, cancel=stop, sampling=self._sampling()):
            pass
        timer.join()

    def close(self) -> None:
        """An answer whose reader goes away."""
        steps = self.engine.stream("Four five six", max_tokens=64, sampling=self._sampling())
        for _ in range(self.random.randrange(1, 6)):
            next(steps, None)
        steps.close()  # type: ignore[attr-defined]

    def save(self) -> None:
        with self.engine.session() as session:
            if session.position:
                session.save(self.folder / f"{self.random.randrange(3)}.safetensors")

    def load(self) -> None:
        for path in sorted(self.folder.iterdir())[:1]:
            with self.engine.session() as session:
                session.load(path)

    def mark(self, began: float) -> Mark:
        """The same text again and again: it must stay the same too."""
        start = time.perf_counter()
        said = self.engine.generate(PROBE, max_tokens=PROBE_TOKENS, sampling=Sampling(temperature=0))
        took = time.perf_counter() - start
        self.probes.add(said.text)
        process = psutil.Process()
        return Mark(
            round(time.perf_counter() - began, 1), process.memory_info().rss, process.num_threads(),
            process.num_fds(), round(said.stats.generated_tokens / took, 1),
        )  # fmt: skip

    def _sampling(self) -> Sampling:
        return Sampling(temperature=1.0, seed=self.random.randrange(1 << 30))


def soak(seconds: float, seed: int = 0) -> dict[str, Any]:
    """Keep an engine busy for so long; the figures."""
    with tempfile.TemporaryDirectory() as place, load(context=2048, ram="512MiB", profile=None) as engine:
        run = Soak(engine, Path(place), seed)
        began = time.perf_counter()
        marks = [run.mark(began)]
        while time.perf_counter() - began < seconds:
            for _ in range(6):
                run.act()
            marks.append(run.mark(began))
        left = sorted(path.name for path in Path(place).iterdir())
    return {
        "seconds": round(seconds, 1),
        "done": dict(run.done),
        "files_left": left,
        **figures(marks, run.probes),
    }


def figures(marks: list[Mark], probes: set[str]) -> dict[str, Any]:
    """What is the same early and late."""
    warm = marks[int(WARM_UP * len(marks)) :]
    fifth = max(1, len(marks) // 5)
    early, late = warm[0], marks[-1]
    return {
        "marks": len(marks),
        "probe_texts": len(probes),
        "early": asdict(early),
        "late": asdict(late),
        "most": {name: max(getattr(mark, name) for mark in warm) for name in ("rss_bytes", "threads", "files")},
        "first_fifth_tps": statistics.median(mark.probe_tps for mark in marks[:fifth]),
        "last_fifth_tps": statistics.median(mark.probe_tps for mark in marks[-fifth:]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(json.dumps(soak(60 * asked.minutes, asked.seed), indent=1))


if __name__ == "__main__":
    main()
