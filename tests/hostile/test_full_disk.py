"""A disk that is full at any write of a save: the old file stays whole, and nothing is left beside it.

A limit on file sizes simulates the full disk: the system refuses the write that would exceed it.
"""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from localmimo.cli.plots.plot import draw_lines
from localmimo.cli.terminal.saved_chats import SavedChat
from localmimo.cli.terminal.saved_chats import _write as write_conversation
from localmimo.engine import Engine
from localmimo.errors import BadRequest, BadSession
from localmimo.experts.policy.profile import Profile, write_profile
from localmimo.experts.policy.trace import TraceWriter, read_trace
from localmimo.serve.session_store import _open_stored, _write_index
from localmimo.system.json_files import JsonLines

pytestmark = pytest.mark.engine("bf16_pack", context=256, ram="256MiB", profile=None)


@contextmanager
def full_after(n_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def never_half(path: Path, save: Callable[[], object], error: type[Exception]) -> None:
    """`save` at every sixteenth of the file it would write, and one byte before its end."""
    save()
    whole = path.read_bytes()
    for n_bytes in [*range(0, len(whole), max(1, len(whole) // 16)), len(whole) - 1]:
        with full_after(n_bytes), pytest.raises(error):
            save()
        assert path.read_bytes() == whole
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_session(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with engine.session() as session:
        session.sync(list(range(3, 43)))
        never_half(path, lambda: session.save(path), BadSession)
        session.load(path)
        assert session.position == 40


def test_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    said = SavedChat([{"role": "user", "content": "a" * 3000}])

    def save() -> None:
        write_conversation(path, said)

    save()
    whole = path.read_bytes()
    for n_bytes in (0, 1, 1000, 3000):
        with full_after(n_bytes), pytest.raises(BadSession):
            save()
        assert path.read_bytes() == whole
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    profile = Profile.empty(2, 6)
    profile.recent[:] = np.float32(0.5)
    never_half(path, lambda: write_profile(path, profile), OSError)


def test_a_servers_note_on_a_session(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    never_half(
        path.with_suffix(".tokens"),
        lambda: _write_index(path, np.arange(900, dtype=np.int32), [3]),
        OSError,
    )
    path.touch()
    found = _open_stored(path)
    assert found is not None and len(found.tokens) == 900


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    never_half(
        tmp_path / "a.png", lambda: draw_lines(tmp_path / "a.png", [1, 2], {"a": [1, 2]}, ("x", "y")), OSError
    )


def test_lines_end_with_the_last_whole_one(tmp_path: Path) -> None:
    """A log, and a trace: what was there stays, half a line does not."""
    path = tmp_path / "log"
    with JsonLines(path, "--stats-json", append=True) as log:
        log.write({"a": 1})
    before = path.read_bytes()
    with JsonLines(path, "--stats-json", append=True) as log, full_after(len(before) + 5):
        with pytest.raises(BadRequest, match="--stats-json: .*log cannot be written"):
            log.write({"b": "x" * 100})
        assert path.read_bytes() == before
    with TraceWriter(tmp_path / "t") as trace, full_after(100), pytest.raises(BadRequest, match="--record"):
        for step in range(100):
            trace.write(step, 1, [1, 2])
    assert read_trace(tmp_path / "t").n_steps == 2
