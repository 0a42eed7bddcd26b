"""Footprint: what a model takes, to the byte, from a pack, a checkpoint folder, a config.json or a family name.

Nothing is read but headers and manifests, and nothing at all of what is not here yet. Knows no machine and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from localmimo.errors import BadModel
from localmimo.model.config import ModelConfig
from localmimo.model.members import MEMBERS, Member, find_member, member_like
from quant import Pack, Recipe, Source, make_listing
from quant.conversion.listing import Listing
from quant.errors import BadCheckpoint
from quant.pack.pack import MANIFEST


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model, packed or as a recipe would pack it."""

    name: str
    kind: str  # pack, checkpoint or described
    config: ModelConfig
    codecs: str  # of experts and dense part, for people
    pack_bytes: int  # the safetensors files
    source_bytes: int | None  # of the checkpoint; None for a pack
    dense_bytes: int  # what must be in memory: everything but experts and draft blocks
    lookup_bytes: int  # of it, embeddings: a token reads one row of them
    page_bytes: int
    member: Member | None
    head_bytes: tuple[int, ...] = ()  # of each draft head
    pack: tuple[Path, str] | None = None  # folder and identity
    files: tuple[Path, ...] = ()  # that lie here and can be read to measure the disk
    notes: tuple[str, ...] = ()

    @property
    def read_bytes(self) -> int:
        """Dense bytes that every token reads."""
        return self.dense_bytes - self.lookup_bytes

    @property
    def experts_bytes(self) -> int:
        return self.page_bytes * self.config.n_experts * len(self.config.moe_layers)


def footprint_of(model: str | Path, recipe: Recipe | None = None) -> Footprint:
    """Open what the user named. Raises BadModel, BadPack or BadCheckpoint with what is wrong."""
    path = Path(model).expanduser()
    if (path / MANIFEST).is_file():
        return _of_pack(path)
    if path.is_dir():
        return _of_folder(path, recipe or Recipe())
    if path.is_file():
        return _of_config(path, recipe or Recipe())
    member = find_member(str(model))
    if member is None:
        raise BadModel(
            f"{model} is no pack, checkpoint folder or config.json here, and no member of the family "
            f"({', '.join(known.name for known in MEMBERS)})."
        )
    source = Source.described(member.config, member.title)
    notes = (member.note,) if member.note else ()
    return _of_source(source, recipe or Recipe(), "described", member, (), notes)


def _of_pack(path: Path) -> Footprint:
    with Pack.open(path) as pack:
        if pack.page is None:
            raise BadModel(f"{path} has no routed experts: there is nothing to plan.")
        config = ModelConfig.parse(pack.config)
        sizes = {name: t.nbytes for name, t in pack.tensors.items()}
        dense = {name: size for name, size in sizes.items() if not name.startswith("mtp.")}
        layers = pack.manifest["layers"]
        recipe = pack.manifest["recipe"]
        return Footprint(
            name=pack.name,
            kind="pack",
            config=config,
            codecs=f"{'+'.join(pack.layouts)}, dense {recipe['dense']}",
            pack_bytes=sum(
                facts["bytes"]
                for file, facts in pack.manifest["files"].items()
                if file.endswith(".safetensors")
            ),
            source_bytes=None,
            dense_bytes=sum(dense.values()),
            head_bytes=_head_bytes(sizes),
            lookup_bytes=dense["embed"],
            page_bytes=pack.page.bytes,
            member=member_like(pack.config),
            pack=(path, pack.id),
            files=tuple(path / facts["file"] for facts in layers.values()),
        )


def _of_folder(path: Path, recipe: Recipe) -> Footprint:
    """A checkpoint folder: by its headers where all files are here, else by its config.json."""
    files = tuple(sorted(path.glob("*.safetensors")))
    try:
        source = Source.open(path)
    except BadCheckpoint as error:
        if not (path / "config.json").is_file():
            raise
        found = _of_config(path / "config.json", recipe)
        return _with(
            found, files, f"Its files are not all here, so this is what config.json implies. {error}"
        )
    with source:
        return _of_source(source, recipe, "checkpoint", member_like(source.config), files)


def _of_config(file: Path, recipe: Recipe) -> Footprint:
    source = Source.described(file.read_bytes(), file.absolute().parent.name or file.name)
    return _of_source(source, recipe, "described", member_like(source.config))


def _with(found: Footprint, files: Sequence[Path], note: str) -> Footprint:
    from dataclasses import replace

    return replace(found, files=tuple(files), notes=(*found.notes, note))


def _of_source(
    source: Source,
    recipe: Recipe,
    kind: str,
    member: Member | None,
    files: Sequence[Path] = (),
    notes: Sequence[str] = (),
) -> Footprint:
    config = ModelConfig.parse(source.config)
    listing = make_listing(source, recipe)
    if listing.page is None:
        raise BadModel(f"{source.name} has no routed experts: there is nothing to plan.")
    return Footprint(
        name=source.name,
        kind=kind,
        config=config,
        codecs=f"{listing.recipe.experts}, dense {listing.recipe.dense}",
        pack_bytes=listing.total_bytes,
        source_bytes=listing.from_bytes,
        dense_bytes=sum(size for name, size in _dense(listing)),
        head_bytes=_head_bytes({entry.name: entry.nbytes for entry in listing.entries}),
        lookup_bytes=sum(size for name, size in _dense(listing) if name == "embed"),
        page_bytes=listing.page.bytes,
        member=member,
        files=tuple(files),
        notes=(*notes, *listing.notes),
    )


def _head_bytes(sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Bytes of each draft head, in order."""
    heads = [
        name.removesuffix("proj") for name in sizes if name.startswith("mtp.") and name.endswith(".proj")
    ]
    return tuple(sum(n for name, n in sizes.items() if name.startswith(head)) for head in sorted(heads))


def _dense(listing: Listing) -> list[tuple[str, int]]:
    return [
        (entry.name, entry.nbytes)
        for file in listing.files
        if file.layer is None
        for entry in file.entries
        if not entry.name.startswith("mtp.")
    ]
