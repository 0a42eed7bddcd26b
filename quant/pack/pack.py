"""A pack, the folder that `localmimo` runs from, opened read-only.

    manifest.json             the pack's settings, page layout, tensors, checksums
    config.json, tokenizer*   copied from the checkpoint as they were
    dense-00001.safetensors   every tensor but the routed experts, NAME.PART for packed matrices
    experts-LL.safetensors    one layer's experts, one page each, on 4096-byte boundaries

A folder without a valid manifest is no pack. Opening checks the manifest against the files' sizes and headers
and reads no weight; `verify.verify` reads everything. Must not know sequences, budgets or how a pack is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.errors import BadPack
from quant.files.bounded import CONFIG_BYTES, LIST_BYTES, read_small
from quant.files.safetensors import Shard
from quant.formats.codec import CODECS, PartSpec, codec
from quant.formats.page import PAGE_ALIGN, Expert, PageLayout

if TYPE_CHECKING:
    import torch

    from quant.formats.qtensor import QTensor

FORMAT = "localmimo-pack"
VERSION = 1
MANIFEST = "manifest.json"
MAX_QUOTED = 300  # characters of an error message that quotes the manifest
VECTOR_DTYPES = ("bf16", "f32")


@dataclass(frozen=True)
class PageAt:
    """The position of an expert's page."""

    file: Path
    offset: int
    nbytes: int
    crc32: int
    codec: str


@dataclass(frozen=True)
class PackedInfo:
    """A dense tensor of a pack; `codec` is the dtype when it is a vector."""

    codec: str
    shape: tuple[int, ...]
    file: str

    @property
    def parts(self) -> dict[str, PartSpec]:
        """Part name -> spec; a vector has the one part ""."""
        if len(self.shape) == 1:
            return {"": PartSpec(self.codec, self.shape)}
        return codec(self.codec).parts((self.shape[0], self.shape[1]))

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.parts.values())


class Pack:
    """An open pack. Dense tensors are read one at a time into fresh memory; pages are only located."""

    def __init__(self, path: Path, manifest_text: bytes) -> None:
        self.path = path
        self.id = hashlib.sha256(manifest_text).hexdigest()
        self.manifest = _parse(manifest_text, path)
        _check_schema(self.manifest, path)
        _check_sizes(self.manifest, path)
        self.config = _config(path)
        self._shards: dict[str, Shard] = {}

    @classmethod
    def open(cls, path: str | Path) -> Pack:
        """Open and check a pack. Raises BadPack with the numbers that disagree."""
        path = Path(path).expanduser()
        try:
            text = read_small(path / MANIFEST, LIST_BYTES)
        except OSError as error:
            hint = ""
            if Path(f"{path.absolute()}.partial").is_dir():
                hint = " A conversion to it was begun; run the same quantize command again to finish it."
            raise BadPack(f"{path} is no pack: it has no readable {MANIFEST}.{hint}") from error
        except ValueError as error:
            raise BadPack(f"{path / MANIFEST} can not be read: {error}.") from error
        return cls(path, text)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        return str(self.manifest["model"]["name"])

    @cached_property
    def page(self) -> PageLayout | None:
        """The layout of the largest pages, usually of all; None when the model has no experts."""
        facts = self.manifest["page"]
        return PageLayout(facts["codec"], facts["hidden"], facts["inner"]) if facts else None

    @property
    def n_bytes(self) -> int:
        return sum(facts["bytes"] for facts in self.manifest["files"].values())

    @cached_property
    def tensors(self) -> dict[str, PackedInfo]:
        """Dense tensors by canonical name."""
        return {
            name: PackedInfo(facts["codec"], tuple(facts["shape"]), facts["file"])
            for name, facts in self.manifest["tensors"].items()
        }

    def has(self, name: str) -> bool:
        return name in self.manifest["tensors"]

    def tensor(self, name: str) -> QTensor | torch.Tensor:
        """A dense tensor, read now: packed when it is a matrix, plain when it is a vector."""
        from quant.formats.qtensor import DTYPES, QTensor

        if not self.has(name):
            raise BadPack(f"{self.path} has no tensor {name}.")
        info = self.tensors[name]
        parts = {}
        for part, spec in info.parts.items():
            raw = self._read_part(info.file, f"{name}.{part}" if part else name, spec)
            parts[part] = raw.view(DTYPES[spec.dtype]).view(spec.shape)
        if len(info.shape) == 1:
            return parts[""]
        return QTensor(info.codec, (info.shape[0], info.shape[1]), parts)

    def page_at(self, layer: int, expert: int) -> PageAt:
        """The position of an expert's page. Raises BadPack when there is no such expert."""
        places = self._places.get(layer, [])
        if not 0 <= expert < len(places):
            raise BadPack(f"{self.path} has no expert {expert} in layer {layer}.")
        return places[expert]

    @property
    def n_pages(self) -> int:
        """Pages in all."""
        return sum(len(facts["crc32"]) for facts in self.manifest["layers"].values())

    @cached_property
    def _places(self) -> dict[int, list[PageAt]]:
        """Layer -> the positions of its pages, computed once: a step needs hundreds of them."""
        return {int(number): self._places_in(facts) for number, facts in self.manifest["layers"].items()}

    def _places_in(self, facts: dict[str, Any]) -> list[PageAt]:
        assert self.page is not None
        file, crcs = self.path / facts["file"], facts["crc32"]
        codecs = facts.get("codecs") or [self.page.codec] * len(crcs)
        sizes = [self.layouts[name].bytes for name in codecs]
        offsets = accumulate(sizes[:-1], initial=facts["data_offset"])
        return [PageAt(file, *place) for place in zip(offsets, sizes, crcs, codecs, strict=True)]

    @cached_property
    def layouts(self) -> dict[str, PageLayout]:
        """Codec -> layout of the pages in that codec."""
        if self.page is None:
            return {}
        used = {name for facts in self.manifest["layers"].values() for name in facts.get("codecs", ())}
        return {name: replace(self.page, codec=name) for name in sorted({self.page.codec, *used})}

    def _read_part(self, file: str, name: str, spec: PartSpec) -> torch.Tensor:
        shard = self._shards.get(file)
        if shard is None:
            shard = self._shards[file] = Shard(self.path / file, BadPack)
        stored = shard.tensors.get(name)
        if stored is None or stored.shape != spec.shape or stored.nbytes != spec.nbytes:
            found = list(stored.shape) if stored else "nothing"
            raise BadPack(
                f"{shard.path}: {name} should be {spec.dtype} {list(spec.shape)}, but there is {found}."
            )
        return shard.read(stored.offset, stored.nbytes)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_small(path / "config.json", CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise BadPack(f"{path / 'config.json'} can not be read: {error}.") from error
    if not isinstance(config, dict):
        raise BadPack(f"{path / 'config.json'} is not a JSON object.")
    return config


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadPack(f"{path / MANIFEST} is not JSON: {error}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadPack(f"{path / MANIFEST} does not describe a {FORMAT}.")
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise BadPack(f"{path / MANIFEST} has the impossible version {version!r}.")
    if version > VERSION:
        raise BadPack(
            f"{path} is a pack of version {version}; this program reads up to {VERSION}. Upgrade it."
        )
    return manifest


class _Schema:
    """Checks of one manifest; messages name the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def require(self, ok: bool, what: str) -> None:
        if not ok:
            quoted = what if len(what) <= MAX_QUOTED else f"{what[:MAX_QUOTED]} ..."
            raise BadPack(f"{self.path / MANIFEST}: {quoted}.")

    def table(self, value: object, key: str) -> dict[str, Any]:
        self.require(isinstance(value, dict), f"{key} must be an object")
        assert isinstance(value, dict)
        return value

    def count(self, value: object, key: str, *, most: int = 1 << 48) -> int:
        self.require(
            type(value) is int and 0 <= value < most, f"{key} is {value!r}, not a count below {most}"
        )
        assert isinstance(value, int)
        return value

    def file(self, value: object, files: Mapping[str, object], key: str) -> str:
        self.require(
            isinstance(value, str) and value in files, f"{key} names {value!r}, which is not among files"
        )
        return str(value)

    def shape(self, value: object, key: str) -> tuple[int, ...]:
        ok = (
            isinstance(value, list)
            and len(value) in (1, 2)
            and all(type(n) is int and 0 < n < 1 << 31 for n in value)
        )
        self.require(ok, f"{key} is {value!r}, not the shape of a vector or matrix")
        assert isinstance(value, list)
        return tuple(value)


def _check_schema(manifest: dict[str, Any], path: Path) -> None:
    schema = _Schema(path)
    for key in ("producer", "model", "source", "recipe", "layers", "tensors", "files", "error"):
        schema.table(manifest.get(key), key)
    schema.require(isinstance(manifest["model"].get("name"), str), "model.name must be a string")
    schema.require(
        isinstance(manifest["source"].get("fingerprint"), str), "source.fingerprint must be a string"
    )
    schema.require(isinstance(manifest.get("recipe_hash"), str), "recipe_hash must be a string")
    _check_files(schema, manifest["files"])
    for name, facts in manifest["tensors"].items():
        _check_tensor(schema, name, schema.table(facts, f"tensors.{name}"), manifest["files"])
    _check_pages(schema, manifest)


def _check_files(schema: _Schema, files: dict[str, Any]) -> None:
    for name, facts in files.items():
        plain = name not in ("", ".", "..", MANIFEST) and not set(name) & set("/\\\0")
        schema.require(plain, f"files names {name!r}, which is no file of the folder")
        facts = schema.table(facts, f"files.{name}")
        schema.count(facts.get("bytes"), f"files.{name}.bytes")
        digest = facts.get("sha256")
        schema.require(isinstance(digest, str) and len(digest) == 64, f"files.{name}.sha256 is no SHA-256")
    schema.require("config.json" in files, "config.json is not among files")


def _check_tensor(schema: _Schema, name: str, facts: dict[str, Any], files: dict[str, Any]) -> None:
    shape = schema.shape(facts.get("shape"), f"tensors.{name}.shape")
    known = VECTOR_DTYPES if len(shape) == 1 else tuple(CODECS)
    chosen = facts.get("codec")
    schema.require(chosen in known, f"tensors.{name}.codec is {chosen!r}; known are {', '.join(known)}")
    schema.file(facts.get("file"), files, f"tensors.{name}.file")


def _check_pages(schema: _Schema, manifest: dict[str, Any]) -> None:
    layers = manifest["layers"]
    if manifest.get("page") is None:
        schema.require(not layers, "there are expert layers but no page layout")
        return
    page = schema.table(manifest["page"], "page")
    schema.require(
        _known(page.get("codec")), f"page.codec is {page.get('codec')!r}; known are {', '.join(CODECS)}"
    )
    for key in ("hidden", "inner"):
        schema.count(page.get(key), f"page.{key}", most=1 << 24)
        schema.require(page[key] > 0, f"page.{key} is 0")
    expected = PageLayout(page["codec"], page["hidden"], page["inner"]).bytes
    schema.require(
        page.get("bytes") == expected, f"page.bytes is {page.get('bytes')!r}, the layout gives {expected}"
    )
    slot = PageLayout(page["codec"], page["hidden"], page["inner"])
    for number, facts in layers.items():
        _check_layer(schema, number, schema.table(facts, f"layers.{number}"), manifest["files"], slot)


def _known(name: object) -> bool:
    return isinstance(name, str) and name in CODECS


def _check_layer(
    schema: _Schema, number: str, facts: dict[str, Any], files: dict[str, Any], slot: PageLayout
) -> None:
    key = f"layers.{number}"
    plain = number.isascii() and number.isdecimal() and len(number) <= 6 and str(int(number)) == number
    schema.require(plain, f"{key} is no layer number")
    file = schema.file(facts.get("file"), files, f"{key}.file")
    offset = schema.count(facts.get("data_offset"), f"{key}.data_offset")
    schema.require(offset % PAGE_ALIGN == 0, f"{key}.data_offset is {offset}, no multiple of {PAGE_ALIGN}")
    crcs = facts.get("crc32")
    schema.require(isinstance(crcs, list) and bool(crcs), f"{key}.crc32 must be a list")
    assert isinstance(crcs, list)
    for crc in crcs:
        schema.count(crc, f"{key}.crc32", most=1 << 32)
    codecs = facts.get("codecs", [slot.codec] * len(crcs))
    known = isinstance(codecs, list) and len(codecs) == len(crcs) and all(map(_known, codecs))
    schema.require(known, f"{key}.codecs must name a codec for each of {len(crcs)} experts")
    sizes = {name: replace(slot, codec=name).bytes for name in {*codecs}}
    schema.require(max(sizes.values()) <= slot.bytes, f"{key} has a page above {slot.bytes} bytes")
    end = offset + sum(sizes[name] for name in codecs)
    schema.require(
        files[file]["bytes"] == end, f"{file} has {files[file]['bytes']} bytes, its pages end at {end}"
    )


def _check_sizes(manifest: dict[str, Any], path: Path) -> None:
    for name, facts in manifest["files"].items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            raise BadPack(f"{path} lacks {name}, which its manifest lists. Convert again.") from error
        if found != facts["bytes"]:
            raise BadPack(
                f"{path / name} has {found:,} bytes; the manifest says {facts['bytes']:,}. Convert again."
            )


def experts_of(pack: Pack) -> dict[int, int]:
    """Layer -> number of experts, in layer order."""
    layers = ((int(number), len(facts["crc32"])) for number, facts in pack.manifest["layers"].items())
    return dict(sorted(layers))


__all__ = [
    "FORMAT",
    "MANIFEST",
    "VERSION",
    "Expert",
    "Pack",
    "PackedInfo",
    "PageAt",
    "PageLayout",
    "experts_of",
]
