"""Small JSON files of a checkpoint, read so that a broken one is a sentence.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from localmimo.errors import BadModel
from quant.files.bounded import LIST_BYTES, read_small


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds; an empty one where there is no such file. Raises BadModel."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_small(path, LIST_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel(
            f"{path} is not valid JSON ({error}); copy the file again from the checkpoint."
        ) from None
    return value if isinstance(value, dict) else {}
