"""The folder of the files that localmimo makes for the user: packs of the embedded model, history, sessions."""

import os
from pathlib import Path


def home() -> Path:
    """LOCALMIMO_HOME, or ~/.localmimo; created if it is missing."""
    path = Path(os.environ.get("LOCALMIMO_HOME") or Path.home() / ".localmimo").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path
