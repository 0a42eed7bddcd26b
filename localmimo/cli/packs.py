"""Names of packs on a command line: a folder, or mimo-mini, the embedded model.

Knows folders; opens nothing.
"""

from __future__ import annotations

from pathlib import Path

from localmimo.errors import BadModel
from localmimo.mini import NAME as EMBEDDED

__all__ = ["EMBEDDED", "folder_of", "pack_folder"]


def folder_of(name: str) -> Path:
    """The folder of the embedded model's pack, by that name, or of a pack that a user named."""
    if name != EMBEDDED:
        return pack_folder(name)
    from localmimo.loading.embedded import embedded_pack

    return embedded_pack()


def pack_folder(name: str | Path) -> Path:
    """The folder of a pack that a user named. Raises BadModel where it is no pack, saying what to do."""
    path = Path(name).expanduser()
    if (path / "manifest.json").is_file():
        return path
    if not path.exists():
        raise BadModel(f"There is no folder {path}.")
    if (path / "config.json").is_file():
        kept = " (its MXFP4 experts keep their values: their bytes are put in the kernels' order)"
        raise BadModel(
            f"{path} is a checkpoint, not a pack. Convert it first{kept if _mxfp4(path) else ''}: "
            f"localmimo quantize {path}"
        )
    partial = path.with_name(path.name + ".partial")
    hint = (
        f" A conversion to it was begun: run its quantize command again ({partial})."
        if partial.is_dir()
        else ""
    )
    raise BadModel(f"{path} is no pack: it has no manifest.json.{hint}")


def _mxfp4(checkpoint: Path) -> bool:
    return '"mxfp4"' in (checkpoint / "config.json").read_text(errors="replace")
