"""An open MiMo-V2 checkpoint, in a folder or on the hub: checked, its tensors readable under canonical names.

Opening reads config.json, the index and every header, but no weight, and imports no torch. It must not know
codecs or packs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.geometry import Geometry
from quant.checkpoint.names import Names
from quant.checkpoint.pieces import Location, Matrix
from quant.checkpoint.published import published_tensors
from quant.errors import BadCheckpoint
from quant.files.bounded import CONFIG_BYTES, LIST_BYTES, read_small
from quant.files.safetensors import Shard, Stored

if TYPE_CHECKING:
    import torch

    from quant.checkpoint.hub import Hub

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MTP_FILE = "model_mtp.safetensors"  # some copies of the index do not list it


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it. `nbytes`: as stored, scales included."""

    shape: tuple[int, ...]
    dtype: str  # bf16, f16, f32, fp8 or mxfp4
    nbytes: int


class Source:
    """An open checkpoint. Tensors are read one at a time into fresh memory."""

    def __init__(self, path: Path, config_text: bytes, shards: dict[str, Shard]) -> None:
        self.path = path
        self.config_text = config_text
        self.config = _parse_json(config_text, path / "config.json")
        self.geometry = Geometry.parse(self.config)
        self._shards = shards
        names = Names(self.geometry, _stored_tensors(shards))
        self.matrices: dict[str, Matrix] = names.matrices
        self.n_mtp = names.n_mtp
        self.skipped = names.skipped
        self.hub: Hub | None = None

    @classmethod
    def open(cls, path: str | Path) -> Source:
        """Check a folder and open it. Raises BadCheckpoint with what is missing, damaged or not as
        config.json says."""
        path = Path(path).expanduser()
        if not path.is_dir():
            raise BadCheckpoint(f"{path} is not a folder with a checkpoint.")
        config_file = path / "config.json"
        if not config_file.is_file():
            raise BadCheckpoint(f"{path} has no config.json; is the download complete?")
        config_text = _read(config_file, CONFIG_BYTES)
        Geometry.parse(
            _parse_json(config_text, config_file)
        )  # before the shards: its message is the clearest
        return cls(path, config_text, _open_shards(path))

    @classmethod
    def described(cls, config: bytes | Mapping[str, Any], name: str) -> Source:
        """The published checkpoint of this config.json, without its files: sizes are known, weights can not be read."""
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        stored: dict[str, Stored] = {}
        offset = 0
        for tensor in published_tensors(_parse_json(text, Path(name) / "config.json")):
            stored[tensor.name] = Stored(*tensor, offset, tensor.nbytes)
            offset += tensor.nbytes
        path = Path(name)
        return cls(path, text, {SINGLE: Shard.absent(path / SINGLE, BadCheckpoint, stored, offset, "")})

    @classmethod
    def on_hub(cls, hub: Hub) -> Source:
        """A checkpoint on the hub: every header is read now, each file is downloaded when it is needed."""
        hub.fetch_small()
        path = hub.path()
        config_text = _read(path / "config.json", CONFIG_BYTES)
        Geometry.parse(_parse_json(config_text, path / "config.json"))
        listed = _listed(path / INDEX) if INDEX in hub.files else {SINGLE: []}
        names = sorted({*listed, *({MTP_FILE} & hub.files.keys())})
        missing = [name for name in names if name not in hub.files]
        if missing:
            raise BadCheckpoint(
                f"{hub.repository} lists {missing[0]} in its index, but does not have it: its upload is incomplete."
            )
        shards = {
            name: Shard.of_header(path / name, BadCheckpoint, hub.header(name), hub.files[name].n_bytes)
            for name in names
        }
        source = cls(path, config_text, shards)
        source.hub = hub
        return source

    def files_of(self, names: Iterable[str]) -> set[str]:
        """The files that these tensors are read from."""
        return {
            location.shard.path.name
            for name in names
            for piece in self.matrices[name].pieces
            for location in (piece.weight, piece.grid.scales if piece.grid else None, piece.exponents)
            if location is not None
        }

    @property
    def file_sizes(self) -> dict[str, int]:
        return {name: shard.n_bytes for name, shard in self._shards.items()}

    def release(self, file: str) -> None:
        """Close a file that is not read any more. One that was downloaded for the conversion is deleted."""
        self._shards[file].close()
        if self.hub is not None:
            self.hub.discard(file)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The model's name: the folder's, or the repository's when the folder is a hub cache snapshot."""
        if self.hub is not None:
            return self.hub.repository.rpartition("/")[2]
        full = self.path.resolve() if self.path.exists() else self.path
        if full.parent.name == "snapshots":
            return full.parent.parent.name.split("--")[-1]
        return full.name

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Canonical name -> shape, stored dtype and bytes, in model order."""
        return {name: TensorInfo(m.shape, m.dtype, m.nbytes) for name, m in self.matrices.items()}

    def experts(self, layer: int) -> range:
        """The expert numbers of a layer; empty for a dense one."""
        return range(self.geometry.n_experts if self.geometry.moe[layer] else 0)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor: bf16 and f32 as stored, everything else dequantised to float32."""
        matrix = self.matrices[name]
        return matrix.rows(0, matrix.shape[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of a tensor, as `read` gives them."""
        return self.matrices[name].rows(start, stop)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the checkpoint without reading weights: config, file names, sizes and header hashes."""
        files = {name: [shard.n_bytes, shard.digest] for name, shard in sorted(self._shards.items())}
        facts = {"config": hashlib.sha256(self.config_text).hexdigest(), "files": files}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(file: Path, most: int) -> bytes:
    try:
        return read_small(file, most)
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{file} can not be read: {error}.") from error


def _parse_json(text: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{file} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{file} is not a JSON object.")
    return value


def _open_shards(path: Path) -> dict[str, Shard]:
    """File name -> open shard. Everything that the index lists must be there."""
    index_file = path / INDEX
    if not index_file.is_file():
        if not (path / SINGLE).is_file():
            raise BadCheckpoint(f"{path} has neither {INDEX} nor {SINGLE}; is the download complete?")
        return {SINGLE: Shard(path / SINGLE, BadCheckpoint)}
    listed = _listed(index_file)
    _check_present(path, listed)
    files = set(listed)
    if (path / MTP_FILE).is_file():
        files.add(MTP_FILE)
    shards = {file: Shard(path / file, BadCheckpoint) for file in sorted(files)}
    for file, names in listed.items():
        missing = sorted(set(names) - shards[file].tensors.keys())
        if missing:
            raise BadCheckpoint(f"{INDEX} puts {missing[0]} into {file}, which does not contain it.")
    return shards


def _listed(index_file: Path) -> dict[str, list[str]]:
    """File -> names of its tensors, as the index says; file names must stay inside the folder."""
    weight_map = _parse_json(_read(index_file, LIST_BYTES), index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{index_file} has no weight_map.")
    listed: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or (file not in listed and not _inside(file)):
            raise BadCheckpoint(
                f"{index_file} puts {name} into {file!r}, which is no safetensors file of the folder."
            )
        listed.setdefault(file, []).append(name)
    return listed


def _inside(file: str) -> bool:
    return Path(file).name == file and file.endswith(".safetensors") and "\0" not in file


def _check_present(path: Path, listed: dict[str, list[str]]) -> None:
    missing = sorted(file for file in listed if not (path / file).is_file())
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise BadCheckpoint(
            f"{path} lacks {missing[0]} with {len(listed[missing[0]]):,} tensors{more}; "
            f"{len(listed) - len(missing)} of {len(listed)} files are there. Finish the download first."
        )


def _stored_tensors(shards: dict[str, Shard]) -> dict[str, Location]:
    stored: dict[str, Location] = {}
    for file, shard in shards.items():
        for name, tensor in shard.tensors.items():
            if name in stored:
                raise BadCheckpoint(
                    f"{name} is stored twice, in {stored[name].shard.path.name} and in {file}."
                )
            stored[name] = Location(shard, tensor)
    return stored
