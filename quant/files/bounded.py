"""A small file from outside, read whole: only a regular file, only up to a limit. It must not know what is in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

CONFIG_BYTES = 16 << 20  # config.json and its like have a few kilobytes
LIST_BYTES = 256 << 20  # an index or manifest of the largest models has ten megabytes


def open_regular(path: Path) -> int:
    """A descriptor of a file, never of a folder, pipe or device (which could give bytes without end, or none). Raises
    OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no file", str(path))
    return descriptor


def read_small(path: Path, most: int) -> bytes:
    """The whole file. Raises OSError, or ValueError where it has more than `most` bytes."""
    with open(open_regular(path), "rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes > most:
            raise ValueError(f"it has {n_bytes:,} bytes, more than {most:,}")
        return file.read(n_bytes)
