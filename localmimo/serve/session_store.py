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

MIN_TOKENS = 32  # a shorter read says little about the rate
ASSUMED_RATE = 300e6  # bytes per second of files, assumed until one was written or read
INDEX_BYTES = 64 << 20  # sixteen million tokens
NEW_WEIGHT = 0.3  # of the newest measurement
_FILE_NAME = re.compile(r"[0-9a-f]{32}\.kv")
log = logging.getLogger("localmimo.serve")


@dataclass(slots=True)
class StoredSession:
    """One file: what it holds and the positions to which a session loaded from it can return."""

    path: Path
    tokens: NDArray[np.int32]
    checkpoints: tuple[int, ...]
    n_bytes: int
    used: float  # time of the last use

    def reach(self, tokens: NDArray[np.int32]) -> int:
        return reach(self.tokens, self.checkpoints, tokens)


class SessionStore:
    """Owns a folder of saved sessions. Used by the engine's thread alone."""

    def __init__(self, folder: Path, limit_bytes: int, turns: TurnCache) -> None:
        self.folder = folder
        self._turns = turns
        self.limit_bytes = limit_bytes
        self.prefill_tps: float | None = None  # measured
        self.bytes_per_s = ASSUMED_RATE
        self.n_saved = 0
        self.n_loaded = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._saved = [saved for path in folder.glob("*.kv") if (saved := _open_stored(path)) is not None]
        for path in {*folder.glob("*.kv")} - {saved.path for saved in self._saved}:
            if _FILE_NAME.fullmatch(
                path.name
            ):  # of a server that was killed before it had written what is in it
                _delete(path)
        for saved in sorted(self._saved, key=lambda saved: saved.used):
            self._read_notes(saved)
        self._free_space(0)

    @property
    def n_bytes(self) -> int:
        return sum(saved.n_bytes for saved in self._saved)

    def __len__(self) -> int:
        return len(self._saved)

    def prepare(self, session: Session, tokens: Sequence[int]) -> None:
        """Bring the session to the state that leaves least of the prompt to read."""
        prompt = np.asarray(tokens, np.int32)
        held = np.asarray(session.tokens, np.int32)
        n_reused = reach(held, session.checkpoints, prompt)
        if self.prefill_tps is None:
            return
        best = max(self._saved, key=lambda saved: saved.reach(prompt), default=None)
        if len(held) - n_reused > 0:
            self._save(session, held, n_reused)
        if (
            best is not None
            and self._pays(best.reach(prompt) - n_reused, best.n_bytes)
            and best in self._saved
        ):
            self._load(session, best)

    def leave(self, session: Session) -> None:
        """The server stops: save what the session holds for the next one."""
        if self.prefill_tps is not None and session.position:
            self._save(session, np.asarray(session.tokens, np.int32), 0)

    def learn(self, stats: Stats) -> None:
        """Measure how quickly a prompt was read."""
        n_read = stats.prompt_tokens - stats.reused_tokens
        if n_read >= MIN_TOKENS and stats.prefill_s > 0:
            rate = n_read / stats.prefill_s
            known = self.prefill_tps
            self.prefill_tps = rate if known is None else known + NEW_WEIGHT * (rate - known)

    def _pays(self, n_tokens: int, n_bytes: int) -> bool:
        """Whether moving the bytes takes less time than reading the tokens."""
        assert self.prefill_tps is not None
        return n_tokens / self.prefill_tps > n_bytes / self.bytes_per_s

    def _save(self, session: Session, held: NDArray[np.int32], n_reused: int) -> None:
        """Save what the next prompt would replace, where reading it again would cost more than writing and loading."""
        if any(len(saved.tokens) == len(held) and (saved.tokens == held).all() for saved in self._saved):
            return
        n_bytes = session.saved_bytes
        if n_bytes > self.limit_bytes or not self._pays(len(held) - n_reused, 2 * n_bytes):
            return
        grown = [saved for saved in self._saved if _is_prefix(held, saved.tokens)]
        self._free_space(n_bytes, grown)
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
        """The turns that a session holds, and the rates that make loading it worthwhile."""
        turns = [turn.as_dict(len(held)) for turn in self._turns.held_by(held.tolist())]
        notes = {"prefill_tps": self.prefill_tps, "bytes_per_s": self.bytes_per_s, "turns": turns}
        with written_aside(_notes(path), 0o600) as file:
            file.write(json.dumps(notes).encode())

    def _read_notes(self, saved: StoredSession) -> None:
        """The turns and rates that an earlier server noted; an unreadable file is skipped."""
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
        self.bytes_per_s += NEW_WEIGHT * (n_bytes / max(seconds, 1e-6) - self.bytes_per_s)

    def _free_space(self, n_bytes: int, outdated: Sequence[StoredSession] = ()) -> None:
        for saved in outdated:
            self._drop(saved)
        for saved in sorted(self._saved, key=lambda saved: saved.used):
            if self.n_bytes + n_bytes > self.limit_bytes:
                self._drop(saved)

    def _drop(self, saved: StoredSession) -> None:
        self._saved = [other for other in self._saved if other is not saved]
        _delete(saved.path)


def reach(held: NDArray[np.int32], checkpoints: Sequence[int], prompt: NDArray[np.int32]) -> int:
    """How many tokens of a prompt a session with these tokens need not read: its windows can rewind a little,
    or to one of its checkpoints."""
    n = min(len(held), len(prompt))
    differ = np.flatnonzero(held[:n] != prompt[:n])
    common = int(differ[0]) if len(differ) else n
    if common >= len(held) - SLACK:
        return common
    return max((checkpoint for checkpoint in checkpoints if checkpoint <= common), default=0)


def _is_prefix(longer: NDArray[np.int32], shorter: NDArray[np.int32]) -> bool:
    return len(shorter) <= len(longer) and bool((longer[: len(shorter)] == shorter).all())


def _delete(path: Path) -> None:
    for file in (path, _index(path), _notes(path)):
        with suppress(OSError):
            file.unlink()


def _index(path: Path) -> Path:
    return path.with_suffix(".tokens")


def _notes(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_index(path: Path, tokens: NDArray[np.int32], checkpoints: Sequence[int]) -> None:
    """What a file holds, beside it, so that a server that starts need not open them all."""
    facts = np.concatenate([np.asarray([len(checkpoints), *checkpoints], np.int32), tokens])
    with written_aside(_index(path), 0o600) as file:  # private text, like the session
        file.write(facts.astype("<i4").tobytes())


def _open_stored(path: Path) -> StoredSession | None:
    """A file of an earlier server; None where it cannot be used."""
    try:
        facts = np.frombuffer(read_small(_index(path), INDEX_BYTES), "<i4").astype(np.int32)
        status = path.stat()
    except (OSError, ValueError):
        return None
    if not len(facts) or not 0 <= facts[0] < len(facts):
        return None
    n_checkpoints = int(facts[0])
    checkpoints = tuple(int(checkpoint) for checkpoint in facts[1 : 1 + n_checkpoints])
    return StoredSession(path, facts[1 + n_checkpoints :], checkpoints, status.st_size, status.st_mtime)
