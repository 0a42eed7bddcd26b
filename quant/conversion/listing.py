"""The listing of a conversion: every tensor, every file of the pack and its exact size, before anything is written.

The conversion follows the listing, so its sizes are those that the files will have. It must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property

from quant.checkpoint.pieces import Matrix
from quant.checkpoint.source import Source
from quant.conversion.recipe import Recipe
from quant.errors import BadRecipe
from quant.files.safetensors import ShardPlan, plan_shard
from quant.formats.codec import ITEM_BYTES, PartSpec, codec
from quant.formats.page import MATRICES, PAGE_ALIGN, PageLayout

DENSE_SHARD = 1 << 28  # a unit of work that is lost at worst when a conversion is interrupted
PROCESS_BYTES = 300_000_000  # Python with torch, measured on Linux
HEADER_BYTES = 2_000  # per tensor: names and places of the checkpoint and of the listing, measured
BAND = 1 << 24  # weights of a matrix that are converted at a time: an expert of the largest model in one go
BAND_BYTES = 22  # per weight of a band: stored bytes, float32, and what the codecs need, measured

GROUPS = ("experts", "attention", "dense mlp", "router", "norms, sinks", "embed", "head", "mtp")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: from what, to what, how big, in which file of the pack."""

    name: str
    group: str
    shape: tuple[int, ...]
    from_dtype: str
    from_bytes: int
    codec: str
    nbytes: int
    file: str

    @property
    def parts(self) -> dict[str, PartSpec]:
        """Names inside the dense file -> spec. A vector has one part, under its own name."""
        if len(self.shape) == 1:
            return {self.name: PartSpec(self.codec, self.shape)}
        rows, cols = self.shape
        return {f"{self.name}.{part}": spec for part, spec in codec(self.codec).parts((rows, cols)).items()}


@dataclass(frozen=True)
class FilePlan:
    """One file of the pack, which is one unit of work: an expert layer, or some dense tensors."""

    shard: ShardPlan
    layer: int | None  # of an expert file
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        return self.shard.file

    @property
    def codecs(self) -> list[str]:
        """Of the experts of an expert file, in order."""
        return [entry.codec for entry in self.entries[:: len(MATRICES)]]


@dataclass(frozen=True)
class GroupTotal:
    """One line of the table."""

    group: str
    n_tensors: int
    from_dtypes: tuple[str, ...]
    codecs: tuple[str, ...]
    from_bytes: int
    nbytes: int


@dataclass(frozen=True)
class Listing:
    """What a pack will consist of. `total_bytes` is that of its safetensors files, to the byte."""

    model: str
    recipe: Recipe
    page: PageLayout | None  # the largest of its experts' pages: what a slot must hold
    files: tuple[FilePlan, ...]
    notes: tuple[str, ...]

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(entry for file in self.files for entry in file.entries)

    @cached_property
    def total_bytes(self) -> int:
        return sum(file.shard.n_bytes for file in self.files)

    @cached_property
    def from_bytes(self) -> int:
        return sum(entry.from_bytes for entry in self.entries)

    @cached_property
    def peak_ram_bytes(self) -> int:
        """Estimated peak resident memory of converting: the process and the largest piece in flight."""
        largest = max(self._unit_ram(file) for file in self.files)
        return PROCESS_BYTES + HEADER_BYTES * len(self.entries) + largest

    @cached_property
    def groups(self) -> tuple[GroupTotal, ...]:
        return tuple(self._total(group) for group in GROUPS if any(e.group == group for e in self.entries))

    def table(self) -> str:
        """The grouped table as text, sizes in decimal units."""
        rows: list[tuple[str, ...]] = [("group", "tensors", "from", "to", "size", "was")]
        rows += [_line(total) for total in self.groups]
        rows.append(
            (
                "total",
                f"{len(self.entries):,}",
                "",
                "",
                size_text(self.total_bytes),
                size_text(self.from_bytes),
            )
        )
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        return "\n".join(_columns(row, widths) for row in rows)

    def as_dict(self) -> dict[str, object]:
        """For --json: totals, groups, files and settings; not the single tensors."""
        return {
            "model": self.model,
            "recipe": self.recipe.as_dict(),
            "total_bytes": self.total_bytes,
            "from_bytes": self.from_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "page_bytes": self.page.bytes if self.page else None,
            "groups": [asdict(total) for total in self.groups],
            "files": [{"file": file.name, "bytes": file.shard.n_bytes} for file in self.files],
            "notes": list(self.notes),
        }

    def _total(self, group: str) -> GroupTotal:
        entries = [entry for entry in self.entries if entry.group == group]
        return GroupTotal(
            group=group,
            n_tensors=len(entries),
            from_dtypes=tuple(sorted({e.from_dtype for e in entries})),
            codecs=tuple(sorted({e.codec for e in entries})),
            from_bytes=sum(e.from_bytes for e in entries),
            nbytes=sum(e.nbytes for e in entries),
        )

    def _unit_ram(self, file: FilePlan) -> int:
        if file.layer is not None:
            assert self.page is not None
            return self.page.bytes + self.page.hidden * self.page.inner * BAND_BYTES
        largest = max(_n_weights(entry) for entry in file.entries)
        return min(largest, BAND) * BAND_BYTES


def make_listing(source: Source, recipe: Recipe) -> Listing:
    """Every tensor with its codec, file and exact bytes. Raises BadRecipe where a rule matches nothing."""
    recipe = recipe.effective(source)
    codecs = {name: recipe.codec_of(matrix) for name, matrix in source.matrices.items()}
    _check_rules(recipe, list(codecs))
    _check_whole_experts(codecs)
    return _lay_out(source, recipe, codecs)


def _lay_out(source: Source, recipe: Recipe, codecs: Mapping[str, str]) -> Listing:
    """The files of the pack. `codecs`: canonical name -> codec, or the dtype of a kept vector."""
    page = _page(source, codecs)
    dense = [(name, m) for name, m in source.matrices.items() if ".experts." not in name]
    files = list(_dense_files(dense, codecs))
    if page:
        files += [_expert_file(source, layer, page, codecs) for layer in source.geometry.moe_layers]
    return Listing(source.name, recipe, page, tuple(files), tuple(_notes(source, recipe, codecs)))


def _page(source: Source, codecs: Mapping[str, str]) -> PageLayout | None:
    geometry = source.geometry
    used = sorted({chosen for name, chosen in codecs.items() if ".experts." in name})
    pages = [PageLayout(chosen, geometry.hidden, geometry.inner_expert) for chosen in used]
    return max(pages, key=lambda page: page.bytes, default=None)


def _dense_files(dense: list[tuple[str, Matrix]], codecs: Mapping[str, str]) -> Iterator[FilePlan]:
    number, size = 1, 0
    batch: list[Entry] = []
    for name, matrix in dense:
        entry = _entry(matrix, codecs[name], f"dense-{number:05d}.safetensors")
        if batch and size + entry.nbytes > DENSE_SHARD:
            yield _dense_file(batch)
            number, size, batch = number + 1, 0, []
            entry = _entry(matrix, codecs[name], f"dense-{number:05d}.safetensors")
        batch.append(entry)
        size += entry.nbytes
    yield _dense_file(batch)


def _dense_file(entries: list[Entry]) -> FilePlan:
    parts = {name: spec for entry in entries for name, spec in entry.parts.items()}
    return FilePlan(plan_shard(entries[0].file, parts), None, tuple(entries))


def _expert_file(source: Source, layer: int, slot: PageLayout, codecs: Mapping[str, str]) -> FilePlan:
    file = f"experts-{layer:02d}.safetensors"
    experts = [f"layers.{layer}.experts.{e}" for e in source.experts(layer)]
    pages = {e: PartSpec("u8", (replace(slot, codec=codecs[f"{e}.gate"]).bytes,)) for e in experts}
    names = [f"{expert}.{matrix}" for expert in experts for matrix in MATRICES]
    entries = tuple(_entry(source.matrices[name], codecs[name], file) for name in names)
    return FilePlan(plan_shard(file, pages, align=PAGE_ALIGN), layer, entries)


def _entry(matrix: Matrix, chosen: str, file: str) -> Entry:
    if len(matrix.shape) == 1:
        nbytes = matrix.shape[0] * ITEM_BYTES[chosen]
    else:
        nbytes = codec(chosen).nbytes((matrix.shape[0], matrix.shape[1]))
    return Entry(
        matrix.name, group_of(matrix), matrix.shape, matrix.dtype, matrix.nbytes, chosen, nbytes, file
    )


def group_of(matrix: Matrix) -> str:
    """The line of the table that a tensor belongs to."""
    name = matrix.name
    if len(matrix.shape) == 1:
        return "router" if name.endswith("router.bias") else "norms, sinks"
    if name in ("embed", "head"):
        return name
    if name.startswith("mtp."):
        return "mtp"
    for part, group in ((".experts.", "experts"), (".router.", "router"), (".attn.", "attention")):
        if part in name:
            return group
    return "dense mlp"


def _notes(source: Source, recipe: Recipe, codecs: Mapping[str, str]) -> Iterable[str]:
    if recipe.experts == "mxfp4" and all(
        m.dtype == "mxfp4" for name, m in source.matrices.items() if ".experts." in name
    ):
        yield "The experts ship as mxfp4 and keep their values exactly."
    if source.skipped:
        counts = ", ".join(f"{n} of {prefix}*" for prefix, n in source.skipped.items())
        yield f"Skipped, not part of the text model: {counts}."
    if recipe.dense == "fp8" and any(codecs[name] == "fp8" for name in codecs if name.endswith(".qkv")):
        yield "FP8 scales that restart inside a matrix are recomputed on a plain grid."


def _n_weights(entry: Entry) -> int:
    rows, *cols = entry.shape
    return rows * (cols[0] if cols else 1)


def _line(total: GroupTotal) -> tuple[str, ...]:
    same = total.from_dtypes == total.codecs
    return (
        total.group,
        f"{total.n_tensors:,}",
        "+".join(total.from_dtypes),
        "kept" if same else "+".join(total.codecs),
        size_text(total.nbytes),
        size_text(total.from_bytes),
    )


def _columns(row: Iterable[str], widths: list[int]) -> str:
    """Names to the left, numbers to the right."""
    cells = [
        c.rjust(w) if i in (1, 4, 5) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def size_text(n_bytes: int) -> str:
    """Bytes for people, decimal units: 170.3 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"


def _check_rules(recipe: Recipe, names: list[str]) -> None:
    for glob, _ in recipe.rules:
        if not any(fnmatchcase(name, glob) for name in names):
            raise BadRecipe(f"The rule {glob!r} matches no tensor of this model.")


def _check_whole_experts(codecs: Mapping[str, str]) -> None:
    """A page has one codec: the three matrices of an expert go together."""
    first: dict[str, tuple[str, str]] = {}
    for name, chosen in codecs.items():
        if ".experts." not in name:
            continue
        other, had = first.setdefault(name.rpartition(".")[0], (name, chosen))
        if had != chosen:
            raise BadRecipe(f"An expert needs one codec, but {other} gets {had} and {name} gets {chosen}.")
