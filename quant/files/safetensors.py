"""A safetensors file: its header read strictly, its tensors read by pread, and the same file laid out in
advance.

Headers and offsets are handled without torch; tensors are read into fresh memory, never mapped, so that
resident memory is what was requested. It must not know what the tensors mean.

Format (safetensors README): 8 bytes little-endian header length, a JSON header, then the data. `data_offsets`
count from the end of the header, leave no holes and do not overlap.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from quant.files.bounded import open_regular
from quant.files.hugepages import allocate
from quant.formats.codec import PartSpec

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # the limit of the reference implementation
MAX_AXES = 8
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
DTYPE_NAMES = {
    "u8": "U8", "i8": "I8", "fp8": "F8_E4M3", "f16": "F16", "bf16": "BF16", "i32": "I32", "f32": "F32",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Shard:
    """One safetensors file, open for reading."""

    def __init__(self, path: Path, error_class: type[Exception], *, max_header: int = MAX_HEADER) -> None:
        """Read and check the header; what is wrong is raised as `error_class`, a sentence that names the file."""
        self.path = path
        self.error_class = error_class
        self.max_header = max_header
        try:
            self._fd = open_regular(path)
        except OSError as error:
            raise error_class(f"{path} can not be opened: {error.strerror}.") from error
        try:
            self.n_bytes = os.fstat(self._fd).st_size
            header = self._header_bytes()
            self.digest = hashlib.sha256(header).hexdigest()
            self.data_offset = 8 + len(header)
            self.tensors = self._parse(header)
        except BaseException:
            self.close()
            raise

    @classmethod
    def absent(
        cls, path: Path, error_class: type[Exception], tensors: dict[str, Stored], n_bytes: int, digest: str
    ) -> Shard:
        """A described file that need not exist yet: it is opened when something is read from it."""
        shard = cls.__new__(cls)
        shard.path, shard.error_class, shard._fd = path, error_class, -1
        shard.tensors, shard.n_bytes, shard.digest = tensors, n_bytes, digest
        return shard

    @classmethod
    def of_header(cls, path: Path, error_class: type[Exception], header: bytes, n_bytes: int) -> Shard:
        """The same from the header's text (without its length), checked like a file's."""
        shard = cls.absent(path, error_class, {}, n_bytes, hashlib.sha256(header).hexdigest())
        shard.data_offset = 8 + len(header)
        shard.tensors = shard._parse(header)
        return shard

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _descriptor(self) -> int:
        """The open file; one that was absent must have become what its header said."""
        if self._fd < 0:
            reopened = Shard(self.path, self.error_class)
            if (reopened.digest, reopened.n_bytes) != (self.digest, self.n_bytes):
                raise self.error_class(
                    f"{self.path} is not the file whose header was read before: get it again."
                )
            self._fd, reopened._fd = reopened._fd, -1
        return self._fd

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def read(self, offset: int, nbytes: int) -> torch.Tensor:
        """nbytes from `offset` of the file as a fresh uint8 tensor."""
        out = allocate(nbytes)
        self.read_into(offset, out.numpy().data)
        return out

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view`, a flat view of bytes, from `offset` of the file."""
        descriptor, nbytes, done = self._descriptor(), len(view), 0
        while done < nbytes:
            try:
                got = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
            except OSError as error:
                raise self.error_class(
                    f"{self.path} can not be read at byte {offset + done:,}: {error.strerror}."
                ) from error
            if not got:
                raise self.error_class(
                    f"{self.path} ends {nbytes - done:,} bytes early: it was cut off while being read."
                )
            done += got

    def forget(self, offset: int, nbytes: int) -> None:
        """Tell the kernel that these bytes will not be read again: converting must not evict everything
        else."""
        if self._fd >= 0:
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _header_bytes(self) -> bytes:
        if self.n_bytes < 8:
            raise self.error_class(f"{self.path} has {self.n_bytes} bytes and can not be a safetensors file.")
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if length > self.max_header:
            raise self.error_class(
                f"{self.path} has a header of {length:,} bytes; at most {self.max_header:,} are allowed."
            )
        if 8 + length > self.n_bytes:
            raise self.error_class(
                f"{self.path} is cut off: its header needs {8 + length:,} bytes, it has {self.n_bytes:,}."
            )
        return os.pread(self._fd, length, 8)

    def _parse(self, header: bytes) -> dict[str, Stored]:
        try:
            entries = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self.error_class(f"The header of {self.path} is not JSON: {error}.") from error
        if not isinstance(entries, dict):
            raise self.error_class(f"The header of {self.path} is not a JSON object.")
        self.metadata = self._metadata(entries.pop("__metadata__", {}))
        found = {name: self._entry(name, entry) for name, entry in entries.items()}
        self._check_contiguous(found)
        return found

    def _metadata(self, found: object) -> dict[str, str]:
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise self.error_class(f"{self.path}: the header's __metadata__ is no object of strings.")
        return found

    def _entry(self, name: str, entry: object) -> Stored:
        wrong = f"{self.path}: the header entry of {name[:200]}"
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
                pass
            case _:
                raise self.error_class(f"{wrong} is malformed.")
        if dtype not in DTYPE_BITS:
            raise self.error_class(f"{wrong} has the unknown dtype {_short(dtype)}.")
        if len(shape) > MAX_AXES:
            raise self.error_class(f"{wrong} has {len(shape):,} axes; at most {MAX_AXES} are allowed.")
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            raise self.error_class(f"{wrong} has an impossible shape {_short(shape)}.")
        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        if not 0 <= start <= stop < 1 << 63:
            raise self.error_class(f"{wrong} spans impossible bytes: {_short([start, stop])}.")
        if stop - start != nbytes:
            raise self.error_class(
                f"{wrong} spans {stop - start:,} bytes, but {dtype} {shape} needs {nbytes:,}."
            )
        return Stored(name, dtype, tuple(shape), self.data_offset + start, nbytes)

    def _check_contiguous(self, tensors: dict[str, Stored]) -> None:
        expected = self.data_offset
        for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
            if tensor.offset != expected:
                raise self.error_class(f"{self.path}: {tensor.name} leaves a hole or overlaps its neighbour.")
            expected += tensor.nbytes
        if expected != self.n_bytes:
            kind = "is cut off" if expected > self.n_bytes else "has bytes that belong to no tensor"
            raise self.error_class(
                f"{self.path} {kind}: its header describes {expected:,} bytes, it has {self.n_bytes:,}."
            )


def _short(value: object) -> str:
    """What a hostile file says, cut to what one wants to read."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    return out


@dataclass(frozen=True)
class ShardPlan:
    """A safetensors file before it exists: its header and the offset of each tensor, counted from its
    start."""

    file: str
    header: bytes
    offsets: dict[str, int]
    n_bytes: int

    @property
    def data_offset(self) -> int:
        return len(self.header)


def plan_shard(
    file: str, tensors: Mapping[str, PartSpec], *, align: int = 8, metadata: Mapping[str, str] | None = None
) -> ShardPlan:
    """Lay a file out. Wide elements come first, so that each tensor is aligned to its element size."""
    order = sorted(tensors, key=lambda name: -_width(tensors[name]))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    offset = 0
    for name in order:
        spec = tensors[name]
        starts[name] = offset
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    header = len(text).to_bytes(8, "little") + text
    return ShardPlan(
        file, header, {name: len(header) + start for name, start in starts.items()}, len(header) + offset
    )


def _width(spec: PartSpec) -> int:
    return DTYPE_BITS[DTYPE_NAMES[spec.dtype]]
