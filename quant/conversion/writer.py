"""The pack writer: owns the bytes of a pack while it is made, and the journal from which a conversion resumes.

Everything is written in OUT.partial, a sibling folder. A file is written aside, flushed to the disk, renamed,
and only then entered in the journal; a run that was killed anywhere leaves finished files, journal lines that
describe them, and at most one unfinished file, which is begun again. The manifest comes last, then the folder
takes its final name. It must not know tensors or codecs.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from quant.conversion.listing import size_text
from quant.errors import BadRecipe, NoSpace, NotWritable
from quant.files.atomic import sync_folder
from quant.files.bounded import LIST_BYTES, read_small
from quant.pack.pack import MANIFEST

JOURNAL = "journal.jsonl"
FULL = (errno.ENOSPC, errno.EDQUOT)
HASH_CHUNK = 1 << 20

Settings = Mapping[str, object]
Record = dict[str, Any]


def partial_path(out: Path) -> Path:
    """Where a pack is made before it gets its name."""
    return out.with_name(out.name + ".partial")


def read_journal(folder: Path) -> tuple[Settings | None, dict[str, Record]]:
    """Settings and finished files of a folder. A line that was cut off by a crash is ignored, and what
    follows it."""
    try:
        text = read_small(folder / JOURNAL, LIST_BYTES).decode(errors="replace")
    except (OSError, ValueError):
        return None, {}
    lines: list[Any] = []
    for line in text.splitlines(keepends=True):
        try:
            lines.append(json.loads(line) if line.endswith("\n") else None)
        except (ValueError, RecursionError):
            lines.append(None)
        if not isinstance(lines[-1], dict):
            lines.pop()
            break
    settings = lines[0].get("settings") if lines else None
    if not isinstance(settings, dict):
        return None, {}
    return settings, {r["file"]: r for r in lines[1:] if _on_disk(folder, r)}


def _on_disk(folder: Path, record: Record) -> bool:
    try:
        name, size = record["file"], record["bytes"]
        known = all(isinstance(error, list) and len(error) == 2 for error in record["distortion"].values())
        known &= isinstance(record["sha256"], str) and isinstance(record["crc32"], list) and type(size) is int
        return known and Path(name).name == name and Path(folder, name).lstat().st_size == size
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return False


def check_settings(place: Path, had: Settings, requested: Settings, way_out: str) -> None:
    """Refuse when a folder was begun with other settings; names the first that differs, with both values."""
    for key in requested:
        if had.get(key) != requested[key]:
            raise BadRecipe(
                f"{place} was made with {key} = {_show(had.get(key))}, "
                f"now {key} = {_show(requested[key])} is asked. {way_out}"
            )


def _show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class PackWriter:
    """Writes one pack. Use as a context manager; leaving it early keeps what is finished."""

    def __init__(self, out: Path, settings: Settings, total_bytes: int) -> None:
        self.out = out
        self.folder = partial_path(out)
        self.settings = settings
        self.total_bytes = total_bytes
        self.done: dict[str, Record] = {}
        self._lock = ExitStack()

    def __enter__(self) -> PackWriter:
        with self._disk_errors(), ExitStack() as lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(locked(self.folder))
            self._resume()
            self._lock = lock.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @contextmanager
    def file(self, name: str) -> Iterator[OpenFile]:
        """Write a file aside. Nothing is kept unless `commit` follows."""
        with self._disk_errors():
            target = OpenFile(self.folder / (name + ".tmp"))
            try:
                yield target
            finally:
                target.close()

    def commit(self, name: str, record: Record) -> Record:
        """Flush the file written aside, give it its name and enter it in the journal."""
        aside = self.folder / (name + ".tmp")
        with self._disk_errors():
            digest = flush_and_hash(aside)
            record = {"file": name, "bytes": aside.stat().st_size, "sha256": digest, **record}
            aside.replace(self.folder / name)
            sync_folder(self.folder)
            self._journal(record)
        self.done[name] = record
        return record

    def write_text(self, name: str, content: bytes) -> Record:
        """A small file in one go; not journalled, since it is quickly made again."""
        aside = self.folder / (name + ".tmp")
        with self._disk_errors():
            aside.write_bytes(content)
            digest = flush_and_hash(aside)
            aside.replace(self.folder / name)
        return {"file": name, "bytes": len(content), "sha256": digest}

    def finish(self, manifest: bytes) -> None:
        """The manifest, then the final name. From the manifest on, the pack is complete."""
        self.write_text(MANIFEST, manifest)
        self.publish()

    def publish(self) -> None:
        """Give a complete folder its final name."""
        with self._disk_errors():
            sync_folder(self.folder)
            (self.folder / JOURNAL).unlink(missing_ok=True)
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink()
            sync_folder(self.folder)
            self.folder.rename(self.out)
            sync_folder(self.out.parent)

    @property
    def complete(self) -> bool:
        """Whether an earlier run got as far as the manifest."""
        return (self.folder / MANIFEST).is_file()

    def _resume(self) -> None:
        if self.complete:
            return
        had, self.done = read_journal(self.folder)
        lines = [{"settings": dict(self.settings)}, *self.done.values()]
        if had is not None:
            check_settings(self.folder, had, self.settings, "Add --restart to begin again.")
        # Written anew, so that a line cut off by a crash does not swallow the next one.
        aside = self.folder / (JOURNAL + ".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        flush_and_hash(aside)
        aside.replace(self.folder / JOURNAL)
        sync_folder(self.folder)

    def _journal(self, record: Record) -> None:
        with (self.folder / JOURNAL).open("a") as journal:
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """A full or read-only disk as a sentence with numbers."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise self._no_space() from error
            raise NotWritable(f"{self.folder} can not be written: {error.strerror}.") from error

    def _no_space(self) -> NoSpace:
        finished = sum(record["bytes"] for record in self.done.values())
        return no_space(self.folder, self.total_bytes - finished)


def no_space(folder: Path, needed: int) -> NoSpace:
    """The sentence about a full disk."""
    free = shutil.disk_usage(existing_parent(folder)).free
    return NoSpace(
        f"The disk of {folder} has {size_text(free)} free; {size_text(needed)} are still needed. "
        "Free some space and run the same command again: finished files are kept."
    )


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


class OpenFile:
    """A file being written at explicit offsets."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done : done + (1 << 30)], offset + done)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def flush_and_hash(path: Path) -> str:
    """Bring a file to the disk and return the SHA-256 of what a reader gets."""
    digest = hashlib.sha256()
    buffer = bytearray(HASH_CHUNK)
    view = memoryview(buffer)
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        offset = 0
        while got := os.preadv(fd, [view], offset):
            digest.update(view[:got])
            offset += got
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, or raise NotWritable. The folder itself is locked: no file stays behind, and
    the lock goes with the process however it ends.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        _take(fd, folder)
        yield
    finally:
        os.close(fd)


def _take(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise NotWritable(f"Another process is converting into {folder}. Wait for it or stop it.") from error
    if not folder.exists() or not os.path.samestat(os.fstat(fd), folder.stat()):
        raise NotWritable(f"{folder} was just finished or removed. Run the same command again.")
