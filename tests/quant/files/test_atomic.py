"""A file is the old one or the new one, and nothing stays behind; what another process is writing is left alone."""

import fcntl
import os
import stat
from pathlib import Path

import pytest

from quant.files.atomic import written_aside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_new_file_takes_the_name_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with written_aside(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_an_error_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="stopped"), written_aside(path) as file:
        file.write(b"new")
        raise ValueError("stopped")
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_the_mode_is_that_of_the_new_file_from_the_start(tmp_path: Path) -> None:
    with written_aside(tmp_path / "a", 0o600):
        (aside,) = tmp_path.iterdir()
        assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_contents_are_on_disk_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "a", []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        synced.append((kind, path.exists(), os.fstat(descriptor).st_size if kind == "file" else None))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with written_aside(path) as file:
        file.write(b"12345")
    assert synced == [("file", False, 5), ("folder", True, None)]


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    for name in (".a.12.partial", ".b.12.partial", ".a.12.partial2", ".a.x.partial", ".xa.12.partial"):
        (tmp_path / name).write_text("left")
    with written_aside(tmp_path / "a"):
        pass
    assert names(tmp_path) == [".a.12.partial2", ".a.x.partial", ".b.12.partial", ".xa.12.partial", "a"]


def test_what_another_process_is_writing_is_left(tmp_path: Path) -> None:
    """Its lock says so: a descriptor of our own holds one as another process would."""
    other = tmp_path / ".a.12.partial"
    other.write_text("being written")
    with other.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with written_aside(tmp_path / "a"):
            pass
        assert names(tmp_path) == [".a.12.partial", "a"]
    with written_aside(tmp_path / "a") as file:
        (aside,) = tmp_path.glob(".a.*.partial")
        with aside.open("rb") as second, pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ours is locked while it is written
        file.write(b"x")
    assert names(tmp_path) == ["a"]
