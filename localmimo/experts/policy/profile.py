"""Profile: what earlier sessions saw of a model's routing, in a file that several processes may share.

One safetensors file per profile. It holds at most PROFILE_TOKENS tokens' worth of counts, and one session adds at most
SESSION_TOKENS: neither a long prompt nor an old habit owns it. Knows arrays and a file; not what they are used for.
"""

import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from localmimo.errors import BadRequest
from localmimo.system.paths import home
from quant.files.atomic import written_aside

SESSION_TOKENS = 512
PROFILE_TOKENS = 2048
FORMAT = "localmimo-stats"
VERSION = "2"
WITH_TRANSITIONS = "1"  # an older version that also held which expert followed which: read, no longer written
_HEADER_BYTES = 4096  # room for the file's JSON header, which is about 500 bytes
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Profile:
    """Counts over `tokens` tokens, faded: uses [rows, experts]."""

    tokens: float
    uses: Array
    recent: Array  # chance per token at the end of the last session [rows, experts]

    @classmethod
    def empty(cls, n_rows: int, n_experts: int) -> Self:
        return cls(0.0, *(np.zeros((n_rows, n_experts), dtype=np.float32) for _ in range(2)))

    def plus(self, session: Self) -> Self:
        """This profile with a session added; the session counts for SESSION_TOKENS at most."""
        share = min(1.0, SESSION_TOKENS / max(session.tokens, 1))
        tokens = self.tokens + share * session.tokens
        fade = min(1.0, PROFILE_TOKENS / max(tokens, 1))
        return replace(
            self,
            tokens=tokens * fade,
            uses=(self.uses + share * session.uses) * np.float32(fade),
            recent=session.recent if session.tokens else self.recent,
        )


class BadProfile(Exception):
    """A profile's file cannot be used; the sentence says why."""


def profile_path(pack: Path, pack_id: str, name: str = "default") -> Path:
    """The file of a profile: PACK/stats/NAME.safetensors, or under LOCALMIMO_HOME where the pack is read-only."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f'The profile is called "{name}"; a name has up to 64 letters, digits, dots, dashes, underscores.'
        )
    folder = pack / "stats"
    writable = os.access(folder if folder.is_dir() else pack, os.W_OK)
    return (folder if writable else home() / "stats" / pack_id[:16]) / f"{name}.safetensors"


def read_profile(path: Path, n_rows: int, n_experts: int) -> Profile | None:
    """The profile at `path`, None where there is none. Raises BadProfile where the file is of no use.

    The size is compared before anything is read, so that a hostile file costs no memory.
    """
    array_bytes = _array_bytes(VERSION, n_rows, n_experts)
    try:
        n_bytes = path.stat().st_size
        sizes = (_array_bytes(version, n_rows, n_experts) for version in (VERSION, WITH_TRANSITIONS))
        if not any(size < n_bytes <= size + _HEADER_BYTES for size in sizes):
            raise BadProfile(
                f"has {n_bytes:,} bytes where {n_rows} layers of {n_experts} experts need {array_bytes:,} and a header"
            )
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadProfile(f"cannot be read: {error.strerror}") from error
    return _parse(raw, n_rows, n_experts)


def _parse(raw: bytes, n_rows: int, n_experts: int) -> Profile:
    """A safetensors file with exactly our arrays, checksummed."""
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length]) if length <= _HEADER_BYTES else {}
        facts = header["__metadata__"]
        version, crc, tokens = facts["version"], int(facts["crc32"], 16), float(facts["tokens"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise BadProfile("has no header that this program knows") from None
    if facts.get("format") != FORMAT or version not in (VERSION, WITH_TRANSITIONS):
        raise BadProfile(f"is of version {version!r}; this program reads {WITH_TRANSITIONS} and {VERSION}")
    if header != _header(version, tokens, crc, n_rows, n_experts):
        raise BadProfile(f"is not about {n_rows} layers of {n_experts} experts")
    data = raw[8 + length :]
    if zlib.crc32(data) != crc:
        raise BadProfile(f"has checksum {zlib.crc32(data):08x}, its header says {crc:08x}")
    offsets = _offsets(version, n_rows, n_experts)
    return _checked(Profile(tokens, *(_array(data, *offsets[name]) for name in ("uses", "recent"))))


def _array(data: bytes, shape: list[int], offset: list[int]) -> Array:
    return np.frombuffer(data[slice(*offset)], dtype="<f4").reshape(shape).astype(np.float32)


def _checked(profile: Profile) -> Profile:
    arrays = (profile.uses, profile.recent)
    sane = all(np.isfinite(array).all() and (array >= 0).all() for array in arrays)
    within = (
        profile.uses.max(initial=0) <= profile.tokens * 1.001 + 1e-3
        and profile.recent.max(initial=0) <= 1.001
    )
    if not (sane and within and 0 <= profile.tokens <= PROFILE_TOKENS):
        raise BadProfile("holds numbers that no session can have counted")
    return profile


def _offsets(version: str, n_rows: int, n_experts: int) -> dict[str, tuple[list[int], list[int]]]:
    """Array -> shape, and where it begins and ends behind the header."""
    shapes = {"uses": [n_rows, n_experts], "recent": [n_rows, n_experts]}
    if version == WITH_TRANSITIONS:
        shapes = {
            "uses": shapes["uses"],
            "follows": [n_rows, n_experts, n_experts],
            "recent": shapes["recent"],
        }
    ends = list(itertools.accumulate(4 * prod(shape) for shape in shapes.values()))
    begins = [0, *ends]
    return {name: (shape, [begins[i], ends[i]]) for i, (name, shape) in enumerate(shapes.items())}


def _array_bytes(version: str, n_rows: int, n_experts: int) -> int:
    return max(end for _, (_, end) in _offsets(version, n_rows, n_experts).values())


def _header(version: str, tokens: float, crc: int, n_rows: int, n_experts: int) -> dict[str, object]:
    facts = {"format": FORMAT, "version": version, "crc32": f"{crc:08x}", "tokens": repr(tokens)}
    tensors = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": offset}
        for name, (shape, offset) in _offsets(version, n_rows, n_experts).items()
    }
    return {"__metadata__": facts, **tensors}


def write_profile(path: Path, profile: Profile) -> None:
    """Write aside, sync, rename: readers see the old file or the new one. Raises OSError."""
    data = b"".join(array.astype("<f4").tobytes() for array in (profile.uses, profile.recent))
    n_rows, n_experts = profile.uses.shape
    header = json.dumps(_header(VERSION, float(profile.tokens), zlib.crc32(data), n_rows, n_experts)).encode()
    header += b" " * (-len(header) % 8)
    with written_aside(path) as file:
        file.write(len(header).to_bytes(8, "little") + header + data)


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the profile against other processes while it is read, changed and written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # no locks here: the rename still keeps the file whole, the last writer wins
        yield
