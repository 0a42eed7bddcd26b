"""Faults while an engine works: each is survived or reported in a sentence, and the tokens after it are the same."""

import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmimo import LocalMimoError, load
from localmimo.chat.turn_cache import TurnCache
from localmimo.decode.options import Sampling
from localmimo.engine import Engine
from localmimo.experts.policy.baselines import Lru
from localmimo.experts.policy.profile import read_profile
from localmimo.experts.store.memory_pressure import MemoryPressure
from localmimo.experts.store.store import ExpertStore
from localmimo.experts.tiers.io_threads import IoThreads
from localmimo.hardware import measurements
from localmimo.serve.session_store import SessionStore, StoredSession
from quant.pack.pack import Pack
from tests.packs import PACKS, make_pack

PROMPT = "one two three " * 12
GREEDY = Sampling(temperature=0)


@contextmanager
def paging(pack: Path, stall_s: float = 60.0) -> Iterator[Engine]:
    """An engine whose every token reads from the disk: four slots."""
    opened = Pack.open(pack)
    assert opened.page is not None
    with load(pack, context=256, profile=None) as engine:
        engine._experts._store.close()
        store = ExpertStore(opened, opened.page.bytes, 4, Lru(5, 8), stall_s=stall_s)
        engine._experts._store = store
        yield engine
        store.close()


def said(engine: Engine) -> list[int]:
    """The same answer, read and written anew."""
    with engine.session() as session:
        session.rewind(session.position)
    return engine.generate(PROMPT, max_tokens=16, sampling=GREEDY).tokens


@pytest.fixture(scope="module")
def expected(packs: Callable[[str], Path]) -> list[int]:
    with paging(packs("nf4")) as engine:
        return said(engine)


class Disk:
    """`os.preadv` with faults drawn by chance; `kinds` are short, slow, broken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, *kinds: str) -> None:
        self.counts = dict.fromkeys(kinds, 0)
        self._random, self._kinds, self._real = random.Random(seed), kinds, os.preadv
        monkeypatch.setattr(os, "preadv", self.read)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        kind = self._random.choice((*self._kinds, "none", "none", "none"))
        if kind in self.counts:
            self.counts[kind] += 1
        if kind == "broken" and self.counts[kind] % 8 == 0:
            raise OSError(errno.EIO, "Input/output error")
        if kind == "slow":
            time.sleep(0.003)
        if kind == "short":
            (buffer,) = buffers
            buffers = [buffer[: self._random.choice((1, 511, 4096, len(buffer)))]]
        return self._real(descriptor, buffers, offset)


def test_short_and_slow_reads_change_no_token(
    nf4_pack: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with paging(nf4_pack) as engine:
        disk = Disk(monkeypatch, 0, "short", "slow")
        assert said(engine) == expected
        assert min(disk.counts.values()) > 20


def test_read_errors_fail_a_step_and_no_more(
    nf4_pack: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = 0
    with paging(nf4_pack) as engine, monkeypatch.context() as patch:
        Disk(patch, 1, "broken", "short")
        for _ in range(12):
            try:
                assert said(engine) == expected
            except LocalMimoError as error:
                assert "Input/output error" in str(error)
                failed += 1
        patch.undo()
        assert failed and said(engine) == expected


def test_a_disk_that_stalls_under_load(
    nf4_pack: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, real = threading.Event(), os.preadv
    with paging(nf4_pack, stall_s=0.3) as engine:
        monkeypatch.setattr(os, "preadv", lambda *args: (go_on.wait(), real(*args))[1])
        for _ in range(2):
            with pytest.raises(LocalMimoError, match="given nothing|came free"):
                said(engine)
        go_on.set()
        assert said(engine) == expected


@pytest.fixture
def interrupted() -> Iterator[list[int]]:
    """A signal every half millisecond: system calls return early with EINTR."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    yield seen
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_interrupted_calls_are_taken_up_again(
    nf4_pack: Path, expected: list[int], interrupted: list[int], tmp_path: Path
) -> None:
    with paging(nf4_pack) as engine:
        assert said(engine) == expected
        with engine.session() as session:
            tokens = list(session.tokens)
            for _ in range(20):
                session.save(tmp_path / "s")
                session.load(tmp_path / "s")
            assert session.tokens == tokens
    again = make_pack(tmp_path / "again", **PACKS["nf4"])
    assert (again / "manifest.json").read_bytes() == (nf4_pack / "manifest.json").read_bytes()
    assert len(interrupted) > 100


def test_a_page_flipped_on_disk_under_load(nf4_pack: Path, expected: list[int], tmp_path: Path) -> None:
    """Every page of a layer is damaged after the pack was opened: none is used; once repaired, the engine goes on."""
    copy = shutil.copytree(nf4_pack, tmp_path / "pack")
    file = Pack.open(copy).page_at(2, 0).file
    whole = file.read_bytes()
    with paging(copy) as engine:
        file.write_bytes(whole[:8192] + bytes(byte ^ 1 for byte in whole[8192:]))
        with pytest.raises(LocalMimoError, match=r"checksum"):
            said(engine)
        file.write_bytes(whole)
        assert said(engine) == expected


def test_a_pack_that_is_deleted_while_open(nf4_pack: Path, tmp_path: Path) -> None:
    """What is not open yet is a sentence, closing warns that the statistics were not saved, and nothing is created."""
    copy = shutil.copytree(nf4_pack, tmp_path / "pack")
    with pytest.warns(UserWarning, match="pack is gone"), load(copy, context=256, ram="256MiB") as engine:
        shutil.rmtree(copy)
        try:
            said(engine)
        except LocalMimoError as error:
            assert str(copy) in str(error)
    assert not copy.exists()


# ---- threads that end ----


def kill(thread: threading.Thread) -> None:
    """Have SystemExit raised in a thread, at its next line of Python."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_readers_that_are_killed_are_replaced(
    nf4_pack: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step whose reader ends fails with a sentence at the worst; none hangs, and the next ones have readers."""
    real, n_reads, n_failed = os.preadv, 0, 0

    def deadly(*args: Any) -> int:
        nonlocal n_reads
        n_reads += 1
        if n_reads % 97 == 0:
            raise SystemExit
        if n_reads % 31 == 0:
            kill(threading.current_thread())
        return real(*args)

    with paging(nf4_pack) as engine:
        monkeypatch.setattr(os, "preadv", deadly)
        for _ in range(6):
            try:
                assert said(engine) == expected
            except LocalMimoError as error:
                assert "was ended in the middle" in str(error)
                n_failed += 1
        monkeypatch.undo()
        assert n_failed and said(engine) == expected
        for thread in engine._experts._store._disk._readers._threads:
            kill(thread)  # while they wait for work
        assert said(engine) == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_whose_report_fails_is_replaced() -> None:
    readers = IoThreads(1)

    def report() -> None:
        raise SystemExit

    guess = readers.prefetch(lambda: None, report)
    assert readers.wait([guess], 5) and not guess.error
    asked = readers.demand(lambda: None)
    assert readers.wait([asked], 5) and not asked.error
    assert readers.close()


def test_a_look_at_the_memory_that_fails_is_followed_by_others() -> None:
    class Few:
        n_slots = 8

        def resize(self, n_slots: int) -> None:
            self.n_slots = n_slots

    answers = iter([OSError("no /proc"), RuntimeError("odd"), 0])
    slots, looked = Few(), threading.Event()

    def free_bytes() -> int:
        answer = next(answers, None)
        if isinstance(answer, Exception):
            raise answer
        looked.set() if answer is None else None
        return answer or 0

    pressure = MemoryPressure(slots, 100, 200, free_bytes, interval_s=0.01)
    assert looked.wait(5) and slots.n_slots < 8
    pressure.close()


# ---- processes ----


def test_sigterm_during_a_save_leaves_a_whole_file(nf4_pack: Path, tmp_path: Path) -> None:
    """Processes that save over and over are ended at any moment; the file is one of those that were written."""
    path = tmp_path / "s"
    with load(nf4_pack, context=256, ram="256MiB", profile=None) as engine, engine.session() as session:
        session.sync(list(range(3, 100)))
        session.save(path)
        held = list(session.tokens)
        for n in range(30):
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                try:
                    while True:
                        session.save(path)
                finally:
                    os._exit(1)
            time.sleep(0.002 + 0.001 * n)
            os.kill(child, signal.SIGTERM)
            assert os.waitpid(child, 0)[1] == signal.SIGTERM
            session.rewind(session.position)
            session.load(path)
            assert session.tokens == held
        session.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]  # what the ended ones left is gone too


TWICE = """
import sys
from localmimo import load
from localmimo.decode.options import Sampling
with load(sys.argv[1], context=256, ram="256MiB") as engine:
    print("open", flush=True)
    sys.stdin.readline()
    print(*engine.generate("a b c", max_tokens=40, sampling=Sampling(temperature=1, seed=3)).tokens)
"""


def test_two_processes_on_one_pack_and_profile(nf4_pack: Path, tmp_path: Path) -> None:
    """Both run at once, say the same, and what both have seen is in the statistics."""
    copy = shutil.copytree(nf4_pack, tmp_path / "pack")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE, str(copy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "open\n"
    answers = [child.communicate("go\n", timeout=60)[0] for child in children]
    assert answers[0] == answers[1] and [child.returncode for child in children] == [0, 0]
    profile = read_profile(copy / "stats" / "default.safetensors", 4, 8)
    n_said = len(answers[0].split())
    assert profile is not None and profile.tokens >= 2 * (n_said - 1) > 2


# ---- clocks ----


def test_a_clock_that_jumps_changes_no_token(
    nf4_pack: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: rng.choice([0.0, 1e9, 4e9]))
    with paging(nf4_pack) as engine:
        assert said(engine) == expected


def test_measurements_from_the_future_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path))
    measurements.keep("ram", {"read": 1e9})
    assert measurements.kept("ram", "read")
    now = time.time()
    for jump in (-3600, 8 * 86400):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        assert measurements.kept("ram", "read") is None


def test_the_last_used_file_stays_though_the_clock_went_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SessionStore(tmp_path, 100, TurnCache())
    for n, clock in enumerate((5e9, 1e9, 3e9)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        store._saved.append(StoredSession(tmp_path / f"{n}.kv", np.zeros(1, np.int32), (), 40, store._now()))
    store._free_space(20)
    assert [saved.path.name for saved in store._saved] == ["1.kv", "2.kv"]
