"""The embedded model's pack: made from the checkpoint inside the package, the first time it is asked for."""

import hashlib
import sys
import time
from pathlib import Path

from localmimo.mini import CHECKPOINT, NAME
from localmimo.system.paths import home


def embedded_pack() -> Path:
    """The pack of mimo-mini under LOCALMIMO_HOME; converts it first (seconds) where it is not there yet."""
    from quant import convert

    out = home() / "packs" / f"{NAME}-{_digest()[:12]}"
    if not (out / "manifest.json").exists():
        began = time.perf_counter()
        print(f"First use: converting the embedded model {NAME} to {out} ...", file=sys.stderr)
        out.parent.mkdir(parents=True, exist_ok=True)
        for _ in convert(CHECKPOINT, out):
            pass
        print(f"Done in {time.perf_counter() - began:.1f} s.", file=sys.stderr)
    return out


def _digest() -> str:
    """SHA-256 over the checkpoint's files: another release of the model gets another pack."""
    total = hashlib.sha256()
    for file in sorted(CHECKPOINT.iterdir()):
        with file.open("rb") as stream:
            total.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
