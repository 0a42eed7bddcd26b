"""A file written aside, synced and renamed: readers see the old one or the new one, also after a kill or a full disk.

It must not know what is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_aside(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to write, which takes the name `path` when the block ends well; else nothing changes. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(descriptor, "w+b") as file:  # noqa: PTH123 (an open descriptor: the mode matters)
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            aside.unlink()


def sync_folder(folder: Path) -> None:
    """Bring names given and taken in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
