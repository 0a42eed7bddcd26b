"""The verification of a pack: everything is read again and compared with its checksums.

It must not repair anything, nor import torch."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quant.errors import BadPack
from quant.files.safetensors import Shard
from quant.pack.pack import Pack

CHUNK = 1 << 22


@dataclass(frozen=True)
class Verified:
    """One file has been read: `problem` is empty or a sentence."""

    file: str
    problem: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Report:
    """The result of verifying a pack."""

    name: str
    n_files: int
    n_bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise BadPack when something is wrong."""
        if self.problems:
            raise BadPack(" ".join(self.problems))


def verify(path: str | Path) -> Report:
    """Read everything and compare it with the manifest. Raises BadPack when the folder can not even be
    opened."""
    with Pack.open(path) as pack:
        steps = list(_check(pack))
        return Report(
            pack.name, len(steps), pack.n_bytes, tuple(step.problem for step in steps if step.problem)
        )


def verify_steps(path: str | Path) -> Iterator[Verified]:
    """The same, file by file, for a progress display."""
    with Pack.open(path) as pack:
        yield from _check(pack)


def _check(pack: Pack) -> Iterator[Verified]:
    layers = {facts["file"]: int(number) for number, facts in pack.manifest["layers"].items()}
    done = 0
    for file, facts in pack.manifest["files"].items():
        done += facts["bytes"]
        problem = _problem(pack, file, facts["sha256"], layers.get(file))
        yield Verified(file, problem, done, pack.n_bytes)


def _problem(pack: Pack, file: str, sha256: str, layer: int | None) -> str:
    path = pack.path / file
    try:
        bad_pages = _bad_pages(pack, layer) if layer is not None else []
        if bad_pages:
            experts = ", ".join(str(expert) for expert in bad_pages[:5]) + (
                ", ..." if len(bad_pages) > 5 else ""
            )
            return f"{path}: the pages of experts {experts} of layer {layer} do not match their checksums."
        if file.endswith(".safetensors"):
            Shard(path, BadPack).close()
        if _sha256(path) != sha256:
            return f"{path} does not match its checksum."
    except BadPack as error:
        return str(error)
    except OSError as error:
        return f"{path} can not be read: {error.strerror}."
    return ""


def _bad_pages(pack: Pack, layer: int) -> list[int]:
    bad = []
    n_experts = len(pack.manifest["layers"][str(layer)]["crc32"])
    fd = os.open(pack.page_at(layer, 0).file, os.O_RDONLY)
    try:
        for expert in range(n_experts):
            page = pack.page_at(layer, expert)
            if zlib.crc32(os.pread(fd, page.nbytes, page.offset)) != page.crc32:
                bad.append(expert)
    finally:
        os.close(fd)
    return bad


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()
