"""Lines: a file of JSON lines written as they come, each whole or not at all; a disk that refuses is a sentence.

Must not know what a line says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from localmimo.errors import BadRequest


class JsonLines:
    """Writes to the file that an `option` of the command line named. Raises BadRequest where that cannot be done."""

    def __init__(self, path: Path, option: str, *, append: bool) -> None:
        self._path, self._option = path, option
        try:
            self._file = path.open("ab" if append else "wb", buffering=0)
        except OSError as error:
            raise self._refused(error) from None

    def write(self, line: Mapping[str, Any]) -> None:
        text = memoryview(json.dumps(line, default=str).encode() + b"\n")
        begin = self._file.tell()
        try:
            while text:
                text = text[self._file.write(text) or 0 :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(begin)  # no half line: the ones before it can be read
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> BadRequest:
        return BadRequest(f"{self._option}: {self._path} cannot be written ({error.strerror}).")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
