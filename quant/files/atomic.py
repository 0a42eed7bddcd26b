"""A file written aside, synced and renamed: readers see the old one or the new one, also after a kill or a full disk.

It must not know what is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_aside(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to write, which gets the name `path` if the block ends without an error. Raises OSError.

    What killed processes left of earlier attempts is deleted first.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _clear(path)
    try:
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(descriptor, "w+b") as file:  # noqa: PTH123 (an open descriptor: the mode matters)
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            aside.unlink()


def _clear(path: Path) -> None:
    """Delete unfinished files that no process writes any more: a writer holds a lock, which ends with its process."""
    left_behind = re.compile(rf"\.{re.escape(path.name)}\.\d+\.partial")
    for other in path.parent.iterdir():
        if left_behind.fullmatch(other.name):
            with suppress(OSError), other.open("rb") as file:
                if _lock(file.fileno()):
                    other.unlink()


def _lock(descriptor: int) -> bool:
    """Lock a file for this process; False where another has it, or there are no locks here."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Bring names given and taken in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
