"""Names of packs on a command line: a folder, or mimo-mini, the model that comes along.

Knows folders; opens nothing.
"""

from __future__ import annotations

from pathlib import Path

from localmimo.errors import BadModel

EMBEDDED = "mimo-mini"


def pack_folder(name: str | Path) -> Path:
    """The folder of a pack that a user named. Raises BadModel where it is no pack, saying what to do."""
    path = Path(name).expanduser()
    if (path / "manifest.json").is_file():
        return path
    if not path.exists():
        raise BadModel(f"There is no folder {path}.")
    if (path / "config.json").is_file():
        raise BadModel(f"{path} is a checkpoint, not a pack. Convert it first: localmimo quantize {path}")
    partial = path.with_name(path.name + ".partial")
    hint = (
        f" A conversion to it was begun: run its quantize command again ({partial})."
        if partial.is_dir()
        else ""
    )
    raise BadModel(f"{path} is no pack: it has no manifest.json.{hint}")
