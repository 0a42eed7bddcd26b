"""Disk space: what a conversion needs, what exists already, and what is free.

Knows sizes; writes nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from localmimo.hardware.host import Machine
from localmimo.hardware.units import format_bytes

if TYPE_CHECKING:
    from quant import Source
    from quant.conversion.listing import Listing


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """What a conversion needs and what there is, in bytes."""

    needed: int
    free: int
    finished: int  # by an earlier run
    peak_ram: int
    free_ram: int
    download: int = 0  # of source files, still to come
    download_peak: int = 0  # of them on disk at a time
    discards: bool = False

    @classmethod
    def of(cls, out: Path, listing: Listing, source: Source, *, restart: bool) -> DiskSpace:
        from quant.conversion.schedule import schedule_of
        from quant.conversion.writer import existing_parent, partial_path, read_journal

        out = out.expanduser().absolute()
        done = {} if restart else read_journal(partial_path(out))[1]
        finished = sum(record["bytes"] for record in done.values())
        if (out / "manifest.json").exists():
            finished = listing.total_bytes
        free = shutil.disk_usage(existing_parent(out)).free
        machine = Machine.probe()
        space = cls(
            listing.total_bytes - finished, free, finished, listing.peak_ram_bytes, machine.free_ram_bytes
        )
        if source.hub is None:
            return space
        schedule = schedule_of(source, listing, done)
        discards = source.hub.folder is not None
        peak = schedule.peak_bytes if discards else schedule.fetch_bytes
        return replace(space, download=schedule.fetch_bytes, download_peak=peak, discards=discards)

    @property
    def fits(self) -> bool:
        """The files that a discarding download leaves at a time are beside the pack; a cache may be elsewhere."""
        return self.needed + (self.download_peak if self.discards else 0) <= self.free

    def text(self, out: Path) -> str:
        """Disk and memory, needed against free."""
        lines = [
            "",
            f"to    {out}",
            f"disk  {format_bytes(self.needed)} needed, {format_bytes(self.free)} free {_mark(self.fits)}",
            f"RAM   {format_bytes(self.peak_ram)} at the peak, {format_bytes(self.free_ram)} free "
            + _mark(self.peak_ram <= self.free_ram),
        ]
        if self.download:
            kept = (
                f"at most {format_bytes(self.download_peak)} of it on disk at a time, beside the pack"
                if self.discards
                else "kept in the hub's cache; --discard-source keeps only what is being converted"
            )
            lines.append(f"hub   {format_bytes(self.download)} to fetch, {kept}")
        if self.finished:
            lines.append(f"      an earlier run left {format_bytes(self.finished)} of it")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, int]:
        return {
            "needed_bytes": self.needed,
            "free_bytes": self.free,
            "finished_bytes": self.finished,
            "download_bytes": self.download,
            "download_peak_bytes": self.download_peak,
        }


def _mark(holds: bool) -> str:
    return "✓" if holds else "✗"
