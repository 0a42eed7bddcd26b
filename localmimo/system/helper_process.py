"""Helper process: a program that answers lines of JSON within a time limit, and is killed where it does not.

The program reads a line, writes a line, and ends at the end of its input. Knows nothing of what it is asked.
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
    """No answer came. timed_out: the program was too slow (True) or ended by itself (False)."""

    def __init__(self, timed_out: bool) -> None:
        super().__init__("it took too long" if timed_out else "it ended without an answer")
        self.timed_out = timed_out


class HelperProcess:
    """One program, started at the first request, and again at the first request after a loss. Thread-safe."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """environment: all that the program gets; None: a copy of this process's own."""
        self._command = list(command)
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._kill: weakref.finalize[Any, Any] | None = None
        self._lock = threading.Lock()

    def request(self, message: Mapping[str, Any], limit_s: float) -> Any:
        """The answer to one message. Raises HelperLost, TypeError or ValueError where the message is no JSON."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                return json.loads(_read_line(process.stdout, time.monotonic() + limit_s))
            except (OSError, ValueError):
                self._stop()
                raise HelperLost(timed_out=False) from None
            except BaseException:  # a late answer would be taken for that of the next request
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
            start_new_session=True,  # Ctrl-C does not reach it, and its own child processes end with it
        )
        self._process, self._kill = process, weakref.finalize(self, _kill_group, process)
        return process

    def _stop(self) -> None:
        if self._kill is not None:
            self._kill()
        self._process = self._kill = None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _read_line(stream: IO[bytes], deadline: float) -> bytes:
    """One line, by this time of the monotonic clock; raises HelperLost."""
    pieces: list[bytes] = []
    while not pieces or not pieces[-1].endswith(b"\n"):
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not select.select([stream], [], [], left_s)[0]:
            raise HelperLost(timed_out=True)
        piece = os.read(stream.fileno(), 1 << 20)
        if not piece:
            raise HelperLost(timed_out=False)
        pieces.append(piece)
    return b"".join(pieces)
