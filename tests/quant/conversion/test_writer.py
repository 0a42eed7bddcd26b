"""The writer's order of operations: a journal line describes a file that is on disk under its name, always."""

import errno
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from quant.conversion.writer import JOURNAL, PackWriter, locked, partial_path, read_journal
from quant.errors import BadRecipe, NoSpace, NotWritable

SETTINGS = {"experts": "nf4", "dense": "int8"}
RECORD = {"crc32": [], "distortion": {}}


def write(writer: PackWriter, name: str, data: bytes) -> None:
    with writer.file(name) as file:
        file.write(0, data)
    writer.commit(name, dict(RECORD))


def begun(out: Path, **files: bytes) -> Path:
    """A conversion that was stopped after these files; its folder."""
    with PackWriter(out, SETTINGS, 1000) as writer:
        for name, data in files.items():
            write(writer, name, data)
    return partial_path(out)


def done(out: Path) -> set[str]:
    """The files that a new run need not make again."""
    with PackWriter(out, SETTINGS, 1000) as writer:
        return set(writer.done)


def test_a_record_says_what_is_in_the_file(tmp_path: Path) -> None:
    folder = begun(tmp_path / "pack", a=b"12345")
    settings, records = read_journal(folder)
    assert settings == SETTINGS
    assert records == {"a": {"file": "a", "bytes": 5, "sha256": sha256(b"12345").hexdigest(), **RECORD}}


def test_name_and_folder_are_on_disk_before_the_journal_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, events, sync = partial_path(tmp_path / "pack"), [], os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        known = "a" in read_journal(folder)[1]
        events.append((path.name, (folder / "a").exists(), known))
        sync(descriptor)

    with PackWriter(tmp_path / "pack", SETTINGS, 1000) as writer, writer.file("a") as file:
        file.write(0, b"12345")
        monkeypatch.setattr(os, "fsync", fsync)
        writer.commit("a", dict(RECORD))
        monkeypatch.undo()
    assert events == [("a.tmp", False, False), (folder.name, True, False), (JOURNAL, True, True)]


@pytest.mark.parametrize("size", [4, 6])
def test_a_finished_file_of_another_size_is_made_again(tmp_path: Path, size: int) -> None:
    folder = begun(tmp_path / "pack", a=b"12345", b=b"1")
    assert done(tmp_path / "pack") == {"a", "b"}
    (folder / "a").write_bytes(bytes(size))
    assert done(tmp_path / "pack") == {"b"}


def test_a_line_without_its_end_is_no_line(tmp_path: Path) -> None:
    """It may be cut off where it happens to be whole JSON; and what is written next begins a line of its own."""
    folder = begun(tmp_path / "pack", a=b"1", b=b"2")
    journal = folder / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-1])
    with PackWriter(tmp_path / "pack", SETTINGS, 1000) as writer:
        assert set(writer.done) == {"a"}
        write(writer, "c", b"3")
    assert set(read_journal(folder)[1]) == {"a", "c"}
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_what_follows_a_damaged_line_is_not_believed(tmp_path: Path) -> None:
    folder = begun(tmp_path / "pack", a=b"1", b=b"2")
    lines = (folder / JOURNAL).read_text().splitlines(keepends=True)
    (folder / JOURNAL).write_text(lines[0] + "{\n" + "".join(lines[1:]))
    assert read_journal(folder) == (SETTINGS, {})


@pytest.mark.parametrize("key", SETTINGS)
def test_other_settings_leave_the_folder_as_it_is(tmp_path: Path, key: str) -> None:
    folder = begun(tmp_path / "pack", a=b"1")
    before = (folder / JOURNAL).read_bytes()
    with pytest.raises(BadRecipe, match=f"{key} = {SETTINGS[key]}, now {key} = bf16"):
        PackWriter(tmp_path / "pack", SETTINGS | {key: "bf16"}, 1000).__enter__()
    assert (folder / JOURNAL).read_bytes() == before


def test_nothing_but_the_pack_gets_the_final_name(tmp_path: Path) -> None:
    with PackWriter(tmp_path / "pack", SETTINGS, 1000) as writer:
        write(writer, "a", b"1")
        with writer.file("left") as file:  # begun and given up
            file.write(0, b"x")
        writer.finish(b"{}")
    assert sorted(path.name for path in (tmp_path / "pack").iterdir()) == ["a", "manifest.json"]
    assert not partial_path(tmp_path / "pack").exists()


def test_writes_go_where_they_are_told_though_the_system_takes_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    with PackWriter(tmp_path / "pack", SETTINGS, 1000) as writer, writer.file("a") as file:
        file.write(4, b"efghij")
        file.write(0, b"abcd")
    assert (writer.folder / "a.tmp").read_bytes() == b"abcdefghij"


def test_a_full_disk_names_what_is_still_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with PackWriter(tmp_path / "pack", SETTINGS, 9_000_000) as writer:
        write(writer, "a", bytes(4_000_000))
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(NoSpace, match=r"5\.0 MB are still needed"):
            write(writer, "b", b"1")


def test_a_folder_that_was_replaced_is_not_the_one_that_is_locked(tmp_path: Path) -> None:
    """Between opening and locking another process may have finished: its folder has the final name then."""
    folder = tmp_path / "pack.partial"
    folder.mkdir()
    opened, real = [], os.open

    def open_and_replace(path: Path, flags: int) -> int:
        opened.append(real(path, flags))
        folder.rename(tmp_path / "pack")
        folder.mkdir()
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", open_and_replace)
        with pytest.raises(NotWritable, match="just finished or removed"), locked(folder):
            pass
    with locked(folder), pytest.raises(NotWritable, match="Another process"), locked(folder):
        pass
    shutil.rmtree(folder)
