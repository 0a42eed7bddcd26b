"""A saved session's file: safetensors with an identity and a checksum, written aside and renamed, read strictly.

Knows files, bytes and the identity that a file must match. Must not know what the tensors
mean, nor hold a model or a cache.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from localmimo.errors import BadSession
from localmimo.kv.block_table import RowPieces
from quant import kernels
from quant.files.atomic import written_aside
from quant.files.safetensors import DTYPE_NAMES, Shard, ShardPlan, Stored, plan_shard
from quant.formats.codec import PartSpec

FORMAT, VERSION = "localmimo-session", "1"
MAX_HEADER = 4 << 20  # a thousand tensors need a fifth of a megabyte
_DTYPES = {
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32",
    torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32",
}  # fmt: skip
_NO_CHECKSUM = "0" * 8


@dataclass(frozen=True, slots=True)
class SessionIdentity:
    """What a session's numbers depend on: with another model, pack or type they are useless."""

    model: str  # for people
    pack: str  # the pack's id
    config: str  # hash of the model's configuration as it is run
    kv: str  # type of the cached keys and values
    dtype: str  # type of the activations

    def check(self, path: Path, found: Mapping[str, str]) -> None:
        """Raise BadSession where the file at `path` belongs to something else."""
        if found.get("format") != FORMAT:
            raise BadSession(f"{path} is no saved session.")
        if found.get("version") != VERSION:
            raise BadSession(
                f"{path} is a session of version {found.get('version')}; this program reads {VERSION}. "
                "Read the conversation again."
            )
        for key, what in (
            ("pack", "pack"),
            ("config", "configuration"),
            ("kv", "KV type"),
            ("dtype", "dtype"),
        ):
            saved_as, in_use = found.get(key, "none"), asdict(self)[key]
            if saved_as != in_use:
                model = f" ({found.get('model')}; this is {self.model})" if key == "pack" else ""
                raise BadSession(
                    f"{path} was saved with the {what} {saved_as[:12]}, and the one in use is {in_use[:12]}{model}: "
                    "the conversation has to be read again."
                )


def write(
    path: Path, identity: SessionIdentity, facts: Mapping[str, str], tensors: Mapping[str, Tensor | RowPieces]
) -> int:
    """Write the file whole or not at all; its bytes. Raises BadSession where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path, 0o600) as file:  # private text
            return _write(file, {"format": FORMAT, "version": VERSION} | asdict(identity) | facts, tensors)
    except OSError as error:
        raise BadSession(f"The session cannot be written to {path}: {error.strerror or error}.") from error


def _write(file: BinaryIO, metadata: Mapping[str, str], tensors: Mapping[str, Tensor | RowPieces]) -> int:
    plan = _plan(metadata, tensors, _NO_CHECKSUM)
    file.write(plan.header)
    checksum = 0
    for name in sorted(plan.offsets, key=plan.offsets.__getitem__):
        for piece in _pieces(tensors[name]):
            checksum = kernels.crc32(piece, checksum)
            file.write(piece.numpy().data)
    file.seek(0)
    file.write(_plan(metadata, tensors, f"{checksum:08x}").header)
    return plan.n_bytes


def _plan(metadata: Mapping[str, str], tensors: Mapping[str, Tensor | RowPieces], checksum: str) -> ShardPlan:
    specs = {name: PartSpec(_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return plan_shard("", specs, metadata={**metadata, "crc32": checksum})


def _pieces(tensor: Tensor | RowPieces) -> Iterator[Tensor]:
    """The tensor's bytes in order, flat, in main memory; no copy of the whole where its first axis is strided."""
    for part in _parts(tensor):
        yield part.cpu().contiguous().view(-1).view(torch.uint8)


class SavedSession:
    """A session's file, open: identity and shapes are checked at once, bytes as they are read."""

    def __init__(self, path: Path, identity: SessionIdentity) -> None:
        self.path = path
        self._shard = Shard(path, BadSession, max_header=MAX_HEADER)
        try:
            self.facts = self._shard.metadata
            identity.check(path, self.facts)
        except BaseException:
            self._shard.close()
            raise

    def __enter__(self) -> "SavedSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shard.close()

    def count(self, key: str) -> int:
        """A fact that is a count. Raises BadSession."""
        text = self.facts.get(key, "")
        if not text.isdecimal() or len(text) > 12:
            raise BadSession(f"{self.path} gives {key} as {text[:20]!r}, which is no count.")
        return int(text)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises BadSession where there is none of the name."""
        return self._stored(name).shape

    def expect(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """The file holds exactly these tensors, or BadSession: nothing is read before all of it fits."""
        found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self._shard.tensors.values()}
        wanted = {name: (DTYPE_NAMES[_DTYPES[dtype]], shape) for name, (dtype, shape) in shapes.items()}
        if found == wanted:
            return
        wrong = next(name for name in [*wanted, *found] if found.get(name) != wanted.get(name))
        raise BadSession(
            f"{self.path}: {wrong} is {_described(found.get(wrong))}, and the model needs "
            f"{_described(wanted.get(wrong))}: "
            "the conversation has to be read again."
        )

    def read(self, targets: Mapping[str, Tensor | RowPieces]) -> None:
        """Fill every tensor of the file into its target; raises BadSession where the checksum disagrees."""
        checksum = 0
        for stored in sorted(self._shard.tensors.values(), key=lambda stored: stored.offset):
            offset = stored.offset
            for target in _views(targets[stored.name]):
                piece = (
                    target if target.device.type == "cpu" else torch.empty(target.shape, dtype=torch.uint8)
                )
                self._shard.read_into(offset, piece.numpy().data)
                checksum = kernels.crc32(piece, checksum)
                offset += piece.numel()
                if piece is not target:
                    target.copy_(piece)
        if f"{checksum:08x}" != self.facts.get("crc32"):
            raise BadSession(
                f"{self.path} has checksum {checksum:08x} and was written with {self.facts.get('crc32')}: "
                "it is damaged, the conversation has to be read again."
            )

    def _stored(self, name: str) -> Stored:
        if name not in self._shard.tensors:
            raise BadSession(f"{self.path} holds no {name}: the conversation has to be read again.")
        return self._shard.tensors[name]


def _views(tensor: Tensor | RowPieces) -> Iterator[Tensor]:
    """The tensor's own bytes in order, flat, to be filled: contiguous, or so behind its first axis."""
    for part in _parts(tensor):
        yield part.view(-1).view(torch.uint8)


def _parts(tensor: Tensor | RowPieces) -> Iterable[Tensor]:
    """The contiguous parts of the tensor, in order."""
    if isinstance(tensor, RowPieces):
        return tensor.pieces()
    return [tensor] if tensor.is_contiguous() else tensor.unbind(0)


def _described(facts: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if facts is None else f"{facts[0]} {list(facts[1])}"
