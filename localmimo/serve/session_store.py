"""Session store: conversations of several clients on disk, so that the engine's one session can change between them.

Before an answer it chooses what the new prompt starts from: what the session holds, or a saved one. It saves
and loads only where that is quicker than reading the tokens again, by rates that were measured on this machine, by this
server or an earlier one; until a prompt has been read, nothing is swapped. Beside each session are the turns that it
holds, so that a later server knows them too. The least recently used files are deleted to keep the disk budget.

Knows sessions, turns, files and times; nothing of requests.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from localmimo.chat.turn_cache import Turn, TurnCache
from localmimo.errors import BadSession, LocalMimoError
from localmimo.limits import SLACK
from localmimo.system.json_files import read_json
from quant.files.atomic import written_aside
from quant.files.bounded import read_small

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from localmimo.decode.session import Session
    from localmimo.decode.steps import Stats

LEAST_TOKENS = 32  # a shorter read says little about the rate
FIRST_RATE = 300e6  # bytes per second of files, assumed until one was written or read
INDEX_BYTES = 64 << 20  # sixteen million tokens
WEIGHT = 0.3  # of the newest measurement
_OURS = re.compile(r"[0-9a-f]{32}\.kv")
log = logging.getLogger("localmimo.serve")


@dataclass(slots=True)
class StoredSession:
    """One file: what it holds and where a session loaded from it can come back to."""

    path: Path
    tokens: NDArray[np.int32]
    places: tuple[int, ...]
    n_bytes: int
    used: float  # time of the last use

    def reach(self, tokens: NDArray[np.int32]) -> int:
        return reach(self.tokens, self.places, tokens)


class SessionStore:
    """Owns a folder of saved sessions. Used by the engine's thread alone."""

    def __init__(self, folder: Path, limit_bytes: int, turns: TurnCache) -> None:
        self.folder = folder
        self._turns = turns
        self.limit_bytes = limit_bytes
        self.prefill_tps: float | None = None  # measured
        self.bytes_per_s = FIRST_RATE
        self.n_saved = 0
        self.n_loaded = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._saved = [saved for path in folder.glob("*.kv") if (saved := _found(path)) is not None]
        for path in {*folder.glob("*.kv")} - {saved.path for saved in self._saved}:
            if _OURS.fullmatch(path.name):  # of a server that was killed before it had written what is in it
                _delete(path)
        for saved in sorted(self._saved, key=lambda saved: saved.used):
            self._take_notes(saved)
        self._make_room(0)

    @property
    def n_bytes(self) -> int:
        return sum(saved.n_bytes for saved in self._saved)

    def __len__(self) -> int:
        return len(self._saved)

    def prepare(self, session: Session, tokens: Sequence[int]) -> None:
        """Have the session begin the prompt where least is left to do."""
        wanted = np.asarray(tokens, np.int32)
        held = np.asarray(session.tokens, np.int32)
        own = reach(held, session.checkpoints, wanted)
        if self.prefill_tps is None:
            return
        best = max(self._saved, key=lambda saved: saved.reach(wanted), default=None)
        if len(held) - own > 0:
            self._keep(session, held, own)
        if best is not None and self._pays(best.reach(wanted) - own, best.n_bytes) and best in self._saved:
            self._load(session, best)

    def leave(self, session: Session) -> None:
        """The server stops: what the session holds is for the next one."""
        if self.prefill_tps is not None and session.position:
            self._keep(session, np.asarray(session.tokens, np.int32), 0)

    def learn(self, stats: Stats) -> None:
        """Take in how quickly a prompt was read."""
        n_read = stats.prompt_tokens - stats.reused_tokens
        if n_read >= LEAST_TOKENS and stats.prefill_s > 0:
            rate = n_read / stats.prefill_s
            known = self.prefill_tps
            self.prefill_tps = rate if known is None else known + WEIGHT * (rate - known)

    def _pays(self, n_tokens: int, n_bytes: int) -> bool:
        """Whether moving the bytes takes less time than reading the tokens."""
        assert self.prefill_tps is not None
        return n_tokens / self.prefill_tps > n_bytes / self.bytes_per_s

    def _keep(self, session: Session, held: NDArray[np.int32], own: int) -> None:
        """Save what the next prompt would push out, where reading it again would cost more than writing and loading."""
        if any(len(saved.tokens) == len(held) and (saved.tokens == held).all() for saved in self._saved):
            return
        n_bytes = session.saved_bytes
        if n_bytes > self.limit_bytes or not self._pays(len(held) - own, 2 * n_bytes):
            return
        grown = [saved for saved in self._saved if _begins(held, saved.tokens)]
        self._make_room(n_bytes, grown)
        path = self.folder / f"{hashlib.sha256(held.tobytes()).hexdigest()[:32]}.kv"
        began = time.perf_counter()
        try:
            written = session.save(path)
            _write_index(path, held, session.checkpoints)
            self._write_notes(path, held)
        except (BadSession, OSError) as error:
            log.warning("A session was not saved: %s", error)
            _delete(path)
            return
        self._measure(written, time.perf_counter() - began)
        self._saved.append(StoredSession(path, held, tuple(session.checkpoints), written, self._now()))
        self.n_saved += 1

    def _write_notes(self, path: Path, held: NDArray[np.int32]) -> None:
        """The turns that a session holds, and the rates that make loading it worth while."""
        turns = [turn.as_dict(len(held)) for turn in self._turns.held_by(held.tolist())]
        notes = {"prefill_tps": self.prefill_tps, "bytes_per_s": self.bytes_per_s, "turns": turns}
        with written_aside(_notes(path), 0o600) as file:
            file.write(json.dumps(notes).encode())

    def _take_notes(self, saved: StoredSession) -> None:
        """What an earlier server noted; what cannot be read is left."""
        try:
            notes = read_json(_notes(saved.path))
            rates = float(notes["prefill_tps"]), float(notes["bytes_per_s"])
            held = saved.tokens.tolist()
            turns = [Turn.of_dict(value, held) for value in notes["turns"]]
            if not all(0 < rate < float("inf") for rate in rates):
                raise ValueError(f"rates of {rates}")
        except (LocalMimoError, OSError, KeyError, TypeError, ValueError, OverflowError):
            return
        self.prefill_tps, self.bytes_per_s = rates
        for turn in turns:
            self._turns.put(turn)

    def _load(self, session: Session, saved: StoredSession) -> None:
        began = time.perf_counter()
        try:
            session.load(saved.path)
        except BadSession as error:
            log.warning("A saved session is dropped: %s", error)
            self._drop(saved)
            return
        self._measure(saved.n_bytes, time.perf_counter() - began)
        saved.used = self._now()
        with suppress(OSError):
            os.utime(saved.path)
        self.n_loaded += 1

    def _now(self) -> float:
        """The time, later than every use so far, whatever was done to the clock."""
        return max([time.time(), *(saved.used + 1e-3 for saved in self._saved)])

    def _measure(self, n_bytes: int, seconds: float) -> None:
        self.bytes_per_s += WEIGHT * (n_bytes / max(seconds, 1e-6) - self.bytes_per_s)

    def _make_room(self, n_bytes: int, useless: Sequence[StoredSession] = ()) -> None:
        for saved in useless:
            self._drop(saved)
        for saved in sorted(self._saved, key=lambda saved: saved.used):
            if self.n_bytes + n_bytes > self.limit_bytes:
                self._drop(saved)

    def _drop(self, saved: StoredSession) -> None:
        self._saved = [other for other in self._saved if other is not saved]
        _delete(saved.path)


def reach(held: NDArray[np.int32], places: Sequence[int], wanted: NDArray[np.int32]) -> int:
    """How many tokens of a prompt a session with these tokens has not to read: the windows reach back a little,
    or to one of its places."""
    n = min(len(held), len(wanted))
    differ = np.flatnonzero(held[:n] != wanted[:n])
    common = int(differ[0]) if len(differ) else n
    if common >= len(held) - SLACK:
        return common
    return max((ticket for ticket in places if ticket <= common), default=0)


def _begins(longer: NDArray[np.int32], shorter: NDArray[np.int32]) -> bool:
    return len(shorter) <= len(longer) and bool((longer[: len(shorter)] == shorter).all())


def _delete(path: Path) -> None:
    for file in (path, _index(path), _notes(path)):
        with suppress(OSError):
            file.unlink()


def _index(path: Path) -> Path:
    return path.with_suffix(".tokens")


def _notes(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_index(path: Path, tokens: NDArray[np.int32], places: Sequence[int]) -> None:
    """What a file holds, beside it, so that a server that starts need not open them all."""
    facts = np.concatenate([np.asarray([len(places), *places], np.int32), tokens])
    with written_aside(_index(path), 0o600) as file:  # private text, as the session
        file.write(facts.astype("<i4").tobytes())


def _found(path: Path) -> StoredSession | None:
    """A file of an earlier server; None where it cannot be used."""
    try:
        facts = np.frombuffer(read_small(_index(path), INDEX_BYTES), "<i4").astype(np.int32)
        status = path.stat()
    except (OSError, ValueError):
        return None
    if not len(facts) or not 0 <= facts[0] < len(facts):
        return None
    n_places = int(facts[0])
    places = tuple(int(ticket) for ticket in facts[1 : 1 + n_places])
    return StoredSession(path, facts[1 + n_places :], places, status.st_size, status.st_mtime)
