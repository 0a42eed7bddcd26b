"""StepLog: a file with one JSON line per token: where its experts were found, the bytes read, the seconds.

Knows steps and their Stats; nothing of how an answer looks.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmimo.system.json_files import JsonLines

if TYPE_CHECKING:
    from localmimo.decode.steps import Step


class StepLog:
    """Appends to a file. The first line of an answer counts the reading of its prompt too."""

    def __init__(self, path: str | Path) -> None:
        self._lines = JsonLines(Path(path).expanduser(), "--stats-json", append=True)
        self._answer = self._step = 0
        self._before: dict[str, Any] = {}
        self._at = 0.0

    def begin(self) -> None:
        """Another answer starts."""
        self._answer, self._step, self._before = self._answer + 1, 0, {}
        self._at = time.perf_counter()

    def add(self, step: Step) -> None:
        """One line for a step that has a token; the numbers are those since the line before."""
        if step.token is None:
            return
        self._step += 1
        now, counts = time.perf_counter(), asdict(step.stats)
        line = {"answer": self._answer, "step": self._step, "token": step.token, "kind": step.kind}
        line |= _since(counts, self._before) | {"s": now - self._at}
        self._lines.write(line)
        self._before, self._at = counts, now


def _since(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What each count has grown by."""
    return {key: _grown(value, before.get(key)) for key, value in now.items()}


def _grown(now: Any, before: Any) -> Any:
    match now:
        case dict():
            return _since(now, before or {})
        case list():
            return [
                _grown(value, earlier) for value, earlier in zip(now, before or [0] * len(now), strict=True)
            ]
        case bool() | None | str():
            return now
    return now - (before or 0)
