"""The conversion of a checkpoint into a pack: unit by unit, resumable, in bounded memory.

`convert` checks everything that can be checked beforehand, then returns an iterator of Progress. A unit is
one file of the pack: the experts of one layer, or up to a gibibyte of dense tensors. Closing the iterator
stops after the last finished unit; the same call goes on from there, and the result is the same to the byte.
"""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quant.checkpoint.source import Source
from quant.conversion.listing import FilePlan, Listing, make_listing
from quant.conversion.manifest import CARD, copied_files, make_card, make_manifest, settings_in, settings_of
from quant.conversion.packing import make_page, write_dense
from quant.conversion.recipe import Recipe
from quant.conversion.schedule import schedule_of
from quant.conversion.writer import (
    JOURNAL,
    OpenFile,
    PackWriter,
    check_settings,
    existing_parent,
    locked,
    no_space,
    partial_path,
    read_journal,
)
from quant.errors import BadPack, NotWritable
from quant.formats.distortion import Distortion
from quant.pack.pack import MANIFEST, Pack

if TYPE_CHECKING:
    from quant.checkpoint.hub import Hub

NOTES_BYTES = 300  # per tensor, in journal and manifest; at most


@dataclass(frozen=True)
class Progress:
    """How far a conversion is. Errors are relative root-mean-square errors of the weights."""

    unit: str  # file being made
    done_units: int
    total_units: int
    done_bytes: int  # of the pack's safetensors files, resumed ones included
    total_bytes: int
    resumed_bytes: int  # finished by an earlier run
    rms_error: float  # of everything quantised so far
    worst_error: float
    worst_name: str
    elapsed_s: float
    note: str = ""  # "already done" when there was nothing to do


@dataclass(frozen=True)
class _Item:
    """A tensor or expert that has been written."""

    name: str
    nbytes: int
    distortion: Distortion
    crc32: int | None = None  # of a page


def _record(items: list[_Item]) -> dict[str, object]:
    """What the journal keeps of a finished file."""
    distortions = {item.name: [item.distortion.squared_error, item.distortion.squared_norm] for item in items}
    return {"crc32": [item.crc32 for item in items if item.crc32 is not None], "distortion": distortions}


class _Tally:
    """Running distortion of many tensors or experts, each added once."""

    def __init__(self) -> None:
        self.total = Distortion()
        self.worst = 0.0
        self.worst_name = ""

    def add(self, name: str, distortion: Distortion) -> None:
        self.total += distortion
        if distortion.rms > self.worst:
            self.worst, self.worst_name = distortion.rms, name


def convert(
    src: str | Path | Source,
    out: str | Path,
    *,
    experts: str = "nf4",
    dense: str = "int8",
    recipe: Recipe | str | Path | None = None,
    restart: bool = False,
) -> Iterator[Progress]:
    """Make the pack `out` from the checkpoint folder `src`, or from an open source, which it closes.

    A source on the hub is fetched file by file; files in its own folder are deleted when nothing reads them any more.
    `recipe` (a Recipe, a preset's name or a .toml file) takes the place of `experts` and `dense`. Raises
    BadCheckpoint, BadRecipe, NoSpace or NotWritable before anything is written; while running, also on a full
    disk.
    """
    source = src if isinstance(src, Source) else Source.open(src)
    listing = make_listing(source, Recipe.of(recipe, experts=experts, dense=dense))
    job = _Job(source, listing, Path(out).expanduser().absolute())
    return job.run() if job.preflight(restart=restart) else job.already_done()


class _Job:
    """One conversion."""

    def __init__(self, source: Source, listing: Listing, out: Path) -> None:
        self.source = source
        self.listing = listing
        self.out = out
        self.settings = settings_of(source, listing)
        self.tally = _Tally()
        self.started = time.monotonic()
        self.done_bytes = 0
        self.resumed_bytes = 0
        self.done_units = 0

    # before

    def preflight(self, *, restart: bool) -> bool:
        """Whether there is work to do; raises when it can not be done."""
        if self.out.exists() and self._finished_before():
            if restart:
                raise NotWritable(f"{self.out} is complete. Delete it first to make it again.")
            return False
        partial = partial_path(self.out)
        if restart:
            _discard(partial)
        had, done = read_journal(partial)
        if had is not None:
            check_settings(partial, had, self.settings, "Add --restart to begin again.")
        elif partial.exists() and not (partial / MANIFEST).exists() and not _only_leftovers(partial):
            raise NotWritable(f"{partial} is in the way and was not made by an earlier run. Move it away.")
        self._check_space(
            sum(record["bytes"] for record in done.values()), complete=(partial / MANIFEST).exists()
        )
        return True

    def _finished_before(self) -> bool:
        """Whether OUT is this very pack; refuses when it is something else."""
        if not self.out.is_dir():
            raise NotWritable(f"{self.out} exists and is not a folder. Choose another --out.")
        if not any(self.out.iterdir()):
            return False
        try:
            with Pack.open(self.out) as pack:
                had = pack.manifest
        except BadPack as error:
            raise NotWritable(
                f"{self.out} exists and is not a complete pack ({error}) Choose another --out."
            ) from error
        check_settings(self.out, settings_in(had), self.settings, "Choose another --out, or delete it first.")
        (self.out / JOURNAL).unlink(missing_ok=True)
        return True

    def _check_space(self, finished: int, *, complete: bool) -> None:
        needed = 0 if complete else self.listing.total_bytes - finished + self._small_bytes()
        parent = existing_parent(self.out)
        if not os.access(parent, os.W_OK):
            raise NotWritable(f"{parent} can not be written: it is read-only for you. Choose another --out.")
        if shutil.disk_usage(parent).free < needed:
            raise no_space(partial_path(self.out), needed)

    def _small_bytes(self) -> int:
        """Bytes written beside the weights: the copied files, journal, card and manifest."""
        copied = sum(len(content) for _, content in copied_files(self.source))
        return copied + NOTES_BYTES * len(self.listing.entries) + (1 << 16)

    # the work

    def already_done(self) -> Iterator[Progress]:
        self.done_units, self.done_bytes = len(self.listing.files), self.listing.total_bytes
        self.resumed_bytes = self.done_bytes
        yield self._progress("", note="already done")

    def run(self) -> Iterator[Progress]:
        with self.source, PackWriter(self.out, self.settings, self.listing.total_bytes) as writer:
            if writer.complete:
                yield from self._publish(writer)
                return
            for file in self.listing.files:
                self._take_over(file, writer)
            if self.source.hub is None:
                for file in self.listing.files:
                    if file.name not in writer.done:
                        yield from self._unit(file, writer)
            else:
                yield from self._from_hub(self.source.hub, writer)
            small = [writer.write_text(name, content) for name, content in self._small_files(writer)]
            writer.finish(make_manifest(self.source, self.listing, writer.done, small))
            yield self._progress("manifest.json")

    def _from_hub(self, hub: Hub, writer: PackWriter) -> Iterator[Progress]:
        """Units in the order that needs the fewest files at a time; the next ones' files arrive meanwhile."""
        files = {file.name: file for file in self.listing.files}
        steps = schedule_of(self.source, self.listing, writer.done).steps
        read = {name for step in steps for name in step.fetch}
        for name in self.source.file_sizes.keys() - read:
            self.source.release(name)  # an earlier run was stopped before it could
        for step, after in zip(steps, (*steps[1:], None), strict=True):
            for name in step.fetch:
                yield self._progress(step.unit, note=f"fetching {name}")
                hub.fetch(name)
            if after is not None:
                hub.expect(after.fetch)
            yield from self._unit(files[step.unit], writer)
            for name in step.discard:
                self.source.release(name)

    def _small_files(self, writer: PackWriter) -> Iterator[tuple[str, bytes]]:
        yield from copied_files(self.source)
        yield CARD, make_card(self.source, self.listing, writer.done).encode()

    def _publish(self, writer: PackWriter) -> Iterator[Progress]:
        """An earlier run was killed between the manifest and the final name."""
        with Pack.open(writer.folder) as pack:
            check_settings(
                writer.folder, settings_in(pack.manifest), self.settings, "Add --restart to begin again."
            )
        writer.publish()
        yield from self.already_done()

    def _take_over(self, file: FilePlan, writer: PackWriter) -> None:
        record = writer.done.get(file.name)
        if record is None:
            return
        for name, (error, norm) in record["distortion"].items():
            self.tally.add(name, Distortion(error, norm))
        self.done_units += 1
        self.done_bytes += record["bytes"]
        self.resumed_bytes += record["bytes"]

    def _unit(self, file: FilePlan, writer: PackWriter) -> Iterator[Progress]:
        before = self.done_bytes
        items: list[_Item] = []
        with writer.file(file.name) as target:
            target.write(0, file.shard.header)
            for item in self._dense(file, target) if file.layer is None else self._experts(file, target):
                items.append(item)
                self.tally.add(item.name, item.distortion)
                self.done_bytes += item.nbytes
                yield self._progress(file.name)
        writer.commit(file.name, _record(items))
        self.done_units += 1
        self.done_bytes = before + file.shard.n_bytes
        yield self._progress(file.name)

    def _dense(self, file: FilePlan, target: OpenFile) -> Iterator[_Item]:
        for entry in file.entries:
            distortion = write_dense(self.source, entry, file.shard.offsets, target)
            yield _Item(entry.name, entry.nbytes, distortion)

    def _experts(self, file: FilePlan, target: OpenFile) -> Iterator[_Item]:
        slot = self.listing.page
        assert slot is not None and file.layer is not None
        for expert, chosen in zip(self.source.experts(file.layer), file.codecs, strict=True):
            name, page = f"layers.{file.layer}.experts.{expert}", replace(slot, codec=chosen)
            buffer, distortion = make_page(self.source, name, page)
            target.write(file.shard.offsets[name], buffer)
            yield _Item(name, page.bytes, distortion, zlib.crc32(buffer))

    def _progress(self, unit: str, note: str = "") -> Progress:
        return Progress(
            unit=unit,
            done_units=self.done_units,
            total_units=len(self.listing.files),
            done_bytes=self.done_bytes,
            total_bytes=self.listing.total_bytes,
            resumed_bytes=self.resumed_bytes,
            rms_error=self.tally.total.rms,
            worst_error=self.tally.worst,
            worst_name=self.tally.worst_name,
            elapsed_s=time.monotonic() - self.started,
            note=note,
        )


def _only_leftovers(partial: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that was killed before its first journal line."""
    return partial.is_dir() and all(p.name == JOURNAL or p.suffix == ".tmp" for p in partial.iterdir())


def _discard(partial: Path) -> None:
    """Remove what an earlier run left, unless it is still running or something else."""
    if not partial.exists():
        return
    if (
        not (partial / JOURNAL).exists()
        and not (partial / MANIFEST).exists()
        and not _only_leftovers(partial)
    ):
        raise NotWritable(f"{partial} is in the way and was not made by an earlier run. Move it away.")
    with locked(partial):
        shutil.rmtree(partial)
