"""Measurements: figures of this machine, kept in a file for a while. Knows keys and figures, not what they mean."""

from __future__ import annotations

import json
import time
from typing import Any

from localmimo.system.paths import home
from quant.files.atomic import written_aside

CACHE = "speeds.json"
FRESH_S = 7 * 86_400


def kept(key: str, *figures: str, fresh_s: float = FRESH_S) -> dict[str, Any] | None:
    """A measurement of the last week (or so) under this key, where the file has these figures of it."""
    entry = _read().get(key)
    names = {"at", *figures}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), int | float) for name in names):
        return None
    return entry if 0 <= time.time() - entry["at"] < fresh_s else None


def keep(key: str, figures: dict[str, Any]) -> None:
    """Remember a measurement; a home that can not be written is no reason to fail."""
    entries = _read() | {key: figures | {"at": time.time()}}
    try:
        with written_aside(home() / CACHE) as file:
            file.write(json.dumps(entries).encode())
    except OSError:
        pass


def _read() -> dict[str, Any]:
    try:
        entries = json.loads((home() / CACHE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}
