"""JSON files: small ones of a checkpoint are read, files of JSON lines are written line by line.

A file that is broken or a disk that refuses is one sentence. Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from localmimo.errors import BadModel, BadRequest
from quant.files.bounded import LIST_BYTES, read_small


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no such file or no object in it. Raises BadModel."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_small(path, LIST_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel(
            f"{path} is not valid JSON ({error}); copy the file again from the checkpoint."
        ) from None
    return value if isinstance(value, dict) else {}


class JsonLines:
    """Writes a file of JSON lines, each whole or not at all. Raises BadRequest where the disk refuses.

    option: the option of the command line that named the file, for the error's text.
    """

    def __init__(self, path: Path, option: str, *, append: bool) -> None:
        self._path, self._option = path, option
        try:
            self._file = path.open("ab" if append else "wb", buffering=0)
        except OSError as error:
            raise self._refused(error) from None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line. Values that are not JSON are written as text."""
        rest = memoryview(json.dumps(line, default=str).encode() + b"\n")
        start = self._file.tell()
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            with suppress(OSError):
                self._file.seek(start)
                self._file.truncate()  # without half a line, the lines before it can be read
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> BadRequest:
        return BadRequest(f"{self._option}: {self._path} cannot be written ({error.strerror}).")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
