"""Child: a helper program that answers lines of JSON within a time limit, and is ended where it does not.

Knows nothing of what it is asked. The program reads a line, writes a line, and ends at the end of its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any


class HelperLost(Exception):
    """No answer came: `in_time` says whether the program ended by itself (True) or was too slow (False)."""

    def __init__(self, in_time: bool) -> None:
        super().__init__("it ended without an answer" if in_time else "it took too long")
        self.in_time = in_time


class HelperProcess:
    """One helper process, started at the first question and again after a loss. Thread-safe."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command = list(command)
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any], limit_s: float) -> Any:
        """The answer to one request; raises HelperLost, after which the next request starts afresh."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                return json.loads(_read_line(process.stdout, time.monotonic() + limit_s))
            except (OSError, ValueError):
                self._stop()
                raise HelperLost(in_time=True) from None
            except BaseException:  # too slow, or Ctrl-C: its answer would be taken for the next one's
                self._stop()
                raise

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=None if self._environment is None else dict(self._environment),
            start_new_session=True,  # Ctrl-C is ours; and what it starts ends with it
        )
        self._process, self._end = process, weakref.finalize(self, _end, process)
        return process

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for end in (process.stdin, process.stdout):
        if end is not None:
            with contextlib.suppress(OSError):
                end.close()


def _read_line(stream: IO[bytes], deadline: float) -> bytes:
    pieces: list[bytes] = []
    while not pieces or not pieces[-1].endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            raise HelperLost(in_time=False)
        piece = os.read(stream.fileno(), 1 << 20)
        if not piece:
            raise HelperLost(in_time=True)
        pieces.append(piece)
    return b"".join(pieces)
