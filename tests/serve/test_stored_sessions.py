"""Which sessions are saved, loaded, replaced and deleted; with a session that only counts what is asked of it."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmimo.chat.turn_cache import TurnCache
from localmimo.decode.steps import Stats
from localmimo.errors import BadSession
from localmimo.limits import SLACK
from localmimo.serve.session_store import ASSUMED_RATE, SessionStore, reach

PLENTY = 1 << 30
SIZE = 1000  # bytes of every file


@dataclass
class Session:
    """Tokens, and a file of SIZE bytes."""

    tokens: list[int] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    saved_bytes: int = SIZE
    loaded: list[Path] = field(default_factory=list)
    damaged: bool = False

    @property
    def position(self) -> int:
        return len(self.tokens)

    def save(self, path: Path) -> int:
        path.write_bytes(bytes(self.saved_bytes))
        return self.saved_bytes

    def load(self, path: Path) -> None:
        if self.damaged:
            raise BadSession("It is damaged.")
        self.loaded.append(path)


def store_of(folder: Path, limit_bytes: int = PLENTY, *, tps: float = 1.0) -> SessionStore:
    store = SessionStore(folder, limit_bytes, TurnCache())
    store.prefill_tps = tps
    return store


def talk(n: int, length: int = 100) -> list[int]:
    """The tokens of conversation n: no two begin alike."""
    return [1000 * n + i for i in range(1, length + 1)]


def leave(store: SessionStore, tokens: list[int]) -> None:
    store.leave(Session(tokens))  # type: ignore[arg-type]


def prepare(store: SessionStore, prompt: list[int], **facts: Any) -> list[Path]:
    """Prepare an empty session for a prompt; the files that were loaded for it."""
    session = Session(**facts)
    store.prepare(session, prompt)  # type: ignore[arg-type]
    return session.loaded


def held(folder: Path) -> set[int]:
    """The conversations that the folder's files hold."""
    return {int(np.fromfile(path, "<i4")[-1]) // 1000 for path in folder.glob("*.tokens")}


def test_reach_at_its_limits() -> None:
    tokens = np.arange(100, dtype=np.int32)

    def branch(at: int) -> np.ndarray:
        return np.concatenate([tokens[:at], np.asarray([-1], np.int32)])

    assert reach(tokens, [], branch(100 - SLACK)) == 100 - SLACK
    assert reach(tokens, [], branch(100 - SLACK - 1)) == 0
    assert reach(tokens, [20, 40], branch(40)) == 40 and reach(tokens, [20, 40], branch(39)) == 20


def test_a_conversation_that_went_on_replaces_its_file(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    leave(store, talk(1, 50))
    leave(store, talk(2, 50))
    leave(store, talk(1, 100))
    assert len(store) == 2 and store.n_saved == 3 and len([*tmp_path.iterdir()]) == 6
    leave(store, talk(1, 100))  # as it is saved already
    assert store.n_saved == 3


def test_the_least_recently_used_is_deleted(tmp_path: Path) -> None:
    store = store_of(tmp_path, 3 * SIZE)
    for n in (1, 2, 3):
        leave(store, talk(n))
    assert len(prepare(store, talk(1))) == 1  # used now: the second is the oldest
    leave(store, talk(4))
    assert held(tmp_path) == {1, 3, 4} and store.n_bytes == 3 * SIZE
    assert len([*tmp_path.iterdir()]) == 9  # nothing of the deleted one is left


def test_a_later_server_knows_what_was_used_last(tmp_path: Path) -> None:
    store = store_of(tmp_path, 3 * SIZE)
    for n in (1, 2, 3):
        leave(store, talk(n))
    for path in tmp_path.glob("*.kv"):  # long ago, in the order in which they were saved
        n = int(np.fromfile(path.with_suffix(".tokens"), "<i4")[-1]) // 1000
        os.utime(path, (n, n))
    assert len(prepare(store, talk(1))) == 1
    smaller = store_of(tmp_path, 2 * SIZE)  # a smaller budget holds from the start
    assert held(tmp_path) == {1, 3} and len(smaller) == 2
    leave(smaller, talk(4))
    assert held(tmp_path) == {1, 4}


def test_private_files_and_no_others(tmp_path: Path) -> None:
    store = store_of(tmp_path / "sessions")
    leave(store, talk(1))
    modes = {path.suffix: path.stat().st_mode & 0o077 for path in (tmp_path / "sessions").iterdir()}
    assert modes.pop(".kv") is not None  # the session writes it itself
    assert modes == {".tokens": 0, ".json": 0}
    assert (tmp_path / "sessions").stat().st_mode & 0o077 == 0


def test_a_damaged_file_is_forgotten(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    leave(store, talk(1))
    assert prepare(store, talk(1), damaged=True) == []
    assert len(store) == 0 and not [*tmp_path.iterdir()] and store.n_loaded == 0


def test_only_what_is_lost_counts_for_saving(tmp_path: Path) -> None:
    """100 tokens are held and the prompt begins with 95 of them: five are lost, which is less than two moves."""
    store = store_of(tmp_path, tps=1.0)
    store.bytes_per_s = SIZE / 10  # a move takes as long as reading 10 tokens
    prepare(store, [*talk(1)[:95], 7], tokens=talk(1))
    assert len(store) == 0
    prepare(store, talk(2), tokens=talk(1, 20))  # exactly as long as writing and loading
    assert len(store) == 0
    prepare(store, talk(2), tokens=talk(1, 21))
    assert len(store) == 1


def test_only_what_is_gained_counts_for_loading(tmp_path: Path) -> None:
    store = store_of(tmp_path, tps=1.0)
    leave(store, talk(1))
    store.bytes_per_s = SIZE / 10
    assert prepare(store, talk(1), tokens=talk(1, 90)) == []  # ten tokens: exactly as long as loading
    store.bytes_per_s = SIZE / 10
    assert len(prepare(store, talk(1), tokens=talk(1, 89))) == 1


def test_a_file_deleted_to_save_another_is_not_loaded(tmp_path: Path) -> None:
    store = store_of(tmp_path, SIZE)
    leave(store, talk(1))
    assert prepare(store, talk(1), tokens=talk(2)) == []  # the second took its space
    assert held(tmp_path) == {2}


def test_a_session_larger_than_the_budget_deletes_nothing(tmp_path: Path) -> None:
    store = store_of(tmp_path, SIZE)
    leave(store, talk(1))
    prepare(store, talk(3), tokens=talk(2), saved_bytes=SIZE + 1)
    assert held(tmp_path) == {1}


def test_nothing_moves_before_a_prompt_was_read(tmp_path: Path) -> None:
    store = SessionStore(tmp_path, PLENTY, TurnCache())
    leave(store, talk(1))
    prepare(store, talk(1), tokens=talk(2))
    assert len(store) == 0 and store.bytes_per_s == ASSUMED_RATE


@pytest.mark.parametrize(("read", "known"), [(31, False), (32, True)])
def test_a_short_prompt_says_nothing_about_the_rate(tmp_path: Path, read: int, known: bool) -> None:
    store = SessionStore(tmp_path, PLENTY, TurnCache())
    store.learn(Stats(prompt_tokens=100 + read, reused_tokens=100, prefill_s=2.0))
    assert store.prefill_tps == (read / 2 if known else None)
    store.learn(Stats(prompt_tokens=200, prefill_s=0.0))
    assert store.prefill_tps == (read / 2 if known else None)


def test_the_newest_rate_weighs_three_tenths(tmp_path: Path) -> None:
    store = store_of(tmp_path, tps=100.0)
    store.learn(Stats(prompt_tokens=200, prefill_s=1.0))
    assert store.prefill_tps == pytest.approx(130)


@pytest.mark.parametrize("facts", [[], [-1, 7], [2, 7], [9, 1, 2]])
def test_a_file_whose_index_cannot_be_right_is_deleted(tmp_path: Path, facts: list[int]) -> None:
    leave(store_of(tmp_path), talk(1))
    (index,) = tmp_path.glob("*.tokens")
    index.write_bytes(np.asarray(facts, "<i4").tobytes())
    assert len(store_of(tmp_path)) == 0 and not [*tmp_path.iterdir()]


def test_a_file_of_somebody_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "other.kv").write_bytes(b"anything")
    (tmp_path / f"{'0' * 32}.kv").write_bytes(b"of a server that was killed")
    assert len(store_of(tmp_path)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["other.kv"]


def test_a_clock_that_is_set_back_does_not_change_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path, 3 * SIZE)
    for n in (1, 2, 3, 4):
        monkeypatch.setattr("localmimo.serve.session_store.time.time", lambda n=n: 1000.0 - n)
        leave(store, talk(n))
    assert held(tmp_path) == {2, 3, 4}


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_rates_that_cannot_be_are_not_taken_over(tmp_path: Path, rate: float) -> None:
    leave(store_of(tmp_path), talk(1))
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prefill_tps": rate}))
    assert SessionStore(tmp_path, PLENTY, TurnCache()).prefill_tps is None


def test_a_load_says_how_quick_the_disk_is(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    leave(store, talk(1))
    before = store.bytes_per_s
    assert len(prepare(store, talk(1))) == 1
    assert store.bytes_per_s != before
