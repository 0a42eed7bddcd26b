"""Whether anything grows: chat, cancelled answers, saving, loading and HTTP clients on the embedded model.

    python -m benchmarks.soak [--minutes 60] [--seed 0]

One process, one engine: used from Python and by a server on a loopback port, whose clients stream, leave in the middle
and send what is no request. Prints JSON: what was done; resident memory, threads and file descriptors early and at the
end; tokens per second of the same probe, and the processor's time for it by that of a fixed piece of work
measured beside it, so that a busy neighbour counts for little. Exits with 1 and a sentence where something is not flat.
"""

import argparse
import asyncio
import http.client
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.report import write_result
from localmimo import load
from localmimo.decode.options import Sampling
from localmimo.engine import Engine
from localmimo.serve.app import make_app
from localmimo.serve.http.auth import AccessCheck
from localmimo.serve.http.listen import listen
from localmimo.serve.server import Server
from localmimo.serve.service import Service

PROBE = "Once upon a time"
PROBE_TOKENS = 24
WARM_UP = 0.2  # the share of the time in which memory may still be taken for the first time
MORE_BYTES, MORE_THREADS, MORE_FILES, SLOWER = (
    24 << 20,
    2,
    2,
    1.25,
)  # late against early: beyond this it grows


@dataclass(frozen=True, slots=True)
class Mark:
    """What the process holds, and how fast it is."""

    at_s: float
    rss_bytes: int
    threads: int
    files: int
    probe_tps: float
    probe_cost: float  # processor seconds by those of the fixed work


class Door:
    """A server over the engine, on a loopback port, in threads of this process."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._service = Service(8, folder, 64 << 20)
        self._service.ready(engine)
        self._socket = listen("127.0.0.1", 0)
        self.port: int = self._socket.getsockname()[1]
        self._server = Server(make_app(self._service, AccessCheck()), drain_s=20)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="door")

    async def _serve(self) -> None:
        await self._server.serve(sockets=[self._socket])
        await self._service.close()

    def __enter__(self) -> "Door":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def ask(self, body: bytes, most: int | None = None) -> int:
        """Send a body, read the answer, or so many bytes of it before leaving; the status."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            answer = client.getresponse()
            answer.read(most)
            return answer.status
        finally:
            client.close()

    def wait_idle(self) -> None:
        """Wait until nobody is served and every connection is gone."""
        while self._service.queue.busy or self._server.server_state.connections:
            time.sleep(0.005)


class Soak:
    """One engine and one conversation, treated at random."""

    def __init__(self, engine: Engine, door: Door, folder: Path, seed: int) -> None:
        self.engine = engine
        self.door = door
        self.numbers = np.ones(1 << 20, np.float32)
        self.folder = folder
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.messages: list[dict[str, Any]] = []
        self.probes: set[str] = set()
        self.acts: tuple[Callable[[], None], ...] = (
            self.chat, self.chat, self.cancel, self.close, self.save, self.load, self.http, self.leave, self.nonsense,
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

    def http(self) -> None:
        """Two clients at once, one of them streaming."""
        clients = [threading.Thread(target=self._visit, args=(stream,)) for stream in (False, True)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def leave(self) -> None:
        """A client that goes away while it is answered."""
        self._visit(True, most=self.random.randrange(1, 2000))

    def nonsense(self) -> None:
        assert self.door.ask(self.random.choice((b"", b"{", b"[[[", b'{"messages": 3}', b"\xff"))) == 400

    def _visit(self, stream: bool, most: int | None = None) -> None:
        body = {
            "model": "mimo-mini", "max_tokens": 16, "seed": self.random.randrange(1 << 30), "stream": stream,
            "messages": [{"role": "user", "content": f"What is number {self.random.randrange(1000)}?"}],
        }  # fmt: skip
        assert self.door.ask(json.dumps(body).encode(), most) == 200

    def work(self) -> float:
        """Processor seconds of a fixed piece of work on one thread."""
        start = time.process_time()
        for _ in range(40):
            np.multiply(self.numbers, 1.0, out=self.numbers)
        return time.process_time() - start

    def mark(self, began: float) -> Mark:
        """The same text again and again: it must stay the same too."""
        self.door.wait_idle()
        work = self.work()
        start, worked = time.perf_counter(), time.process_time()
        said = self.engine.generate(PROBE, max_tokens=PROBE_TOKENS, sampling=Sampling(temperature=0))
        took, worked = time.perf_counter() - start, time.process_time() - worked
        work = (work + self.work()) / 2
        self.probes.add(said.text)
        process = psutil.Process()
        return Mark(
            round(time.perf_counter() - began, 1), process.memory_info().rss, process.num_threads(),
            process.num_fds(), round(said.stats.generated_tokens / took, 1), round(worked / work, 3),
        )  # fmt: skip

    def _sampling(self) -> Sampling:
        return Sampling(temperature=1.0, seed=self.random.randrange(1 << 30))


def soak(seconds: float, seed: int = 0) -> dict[str, Any]:
    """Keep an engine busy for so long; the figures."""
    with (
        tempfile.TemporaryDirectory() as place,
        tempfile.TemporaryDirectory() as sessions_dir,
        load(context=2048, ram="512MiB", profile=None) as engine,
        Door(engine, Path(sessions_dir)) as door,
    ):
        run = Soak(engine, door, Path(place), seed)
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
    fifth = max(1, len(warm) // 5)
    early, late = warm[:fifth], warm[-fifth:]
    return {
        "marks": len(marks),
        "probe_texts": len(probes),
        "first": asdict(marks[0]),
        "early": asdict(_middle(early)),
        "late": asdict(_middle(late)),
        "grown": _grown(_middle(early), _middle(late)) + (["text of the probe"] if len(probes) > 1 else []),
    }


def _middle(marks: list[Mark]) -> Mark:
    """The median of each figure."""
    fields = {name: [getattr(mark, name) for mark in marks] for name in Mark.__slots__}
    return Mark(**{name: statistics.median_low(values) for name, values in fields.items()})


def _grown(early: Mark, late: Mark) -> list[str]:
    """What is not flat."""
    limits = {
        "rss_bytes": early.rss_bytes + MORE_BYTES,
        "threads": early.threads + MORE_THREADS,
        "files": early.files + MORE_FILES,
        "probe_cost": early.probe_cost * SLOWER,
    }
    return [name for name, limit in limits.items() if getattr(late, name) > limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    found = soak(60 * asked.minutes, asked.seed)
    write_result("soak", found)
    if found["grown"]:
        sys.exit(f"Not flat: {', '.join(found['grown'])} (early and late above).")


if __name__ == "__main__":
    main()
