"""Where localmimo keeps what it makes for the user: packs of the embedded model, history, sessions."""

import os
from pathlib import Path


def home() -> Path:
    """LOCALMIMO_HOME, or ~/.localmimo; made when it is first needed."""
    path = Path(os.environ.get("LOCALMIMO_HOME") or Path.home() / ".localmimo").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path
