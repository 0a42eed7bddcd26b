"""The order in which a conversion makes its units while source files are downloaded one by one, and the disk it needs.

A unit can start when all files that it reads are on the disk; a file can be deleted when all units that read it are
done. It must not touch files: it works with names and sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quant.checkpoint.source import Source
    from quant.conversion.listing import FilePlan, Listing


@dataclass(frozen=True)
class ScheduleStep:
    """One unit: what must be fetched before it, what may be discarded after it."""

    unit: str
    fetch: tuple[str, ...]
    discard: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """All units in order. `peak_bytes`: source files on the disk at a time, those of the next step included."""

    steps: tuple[ScheduleStep, ...]
    peak_bytes: int
    fetch_bytes: int


def schedule_of(source: Source, listing: Listing, done: Mapping[str, object]) -> Schedule:
    """The order in which the units that are left are made when the source's files come one by one."""
    reads = {
        file.name: sorted(source.files_of(entry.name for entry in file.entries))
        for file in sorted(listing.files, key=_first_layer)
        if file.name not in done
    }
    return make_schedule(reads, source.file_sizes)


def _first_layer(file: FilePlan) -> tuple[int, int]:
    """Where a unit begins in the model; what belongs to no layer comes first."""
    layers = [int(e.name.split(".")[1]) for e in file.entries[:8] if e.name.startswith("layers.")]
    return min(layers, default=-1), 0 if file.layer is None else 1


def make_schedule(reads: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> Schedule:
    """Order units so that few source bytes are on the disk at a time.

    reads: unit -> the files it reads, units in model order; sizes: file -> bytes. The best of three orders: always the
    unit that needs the fewest new bytes; along the files; along the model.
    """
    candidates = (
        _thrifty(reads, sizes),
        sorted(reads, key=lambda unit: _last_file(unit, reads)),
        list(reads),
    )
    return min((_carried_out(order, reads, sizes) for order in candidates), key=lambda s: s.peak_bytes)


def _thrifty(reads: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> list[str]:
    left, on_disk, order = dict(reads), set[str](), []
    while left:
        unit = min(left, key=lambda name: sum(sizes[file] for file in set(left[name]) - on_disk))
        on_disk |= set(left.pop(unit))
        order.append(unit)
    return order


def _last_file(unit: str, reads: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    return max(reads[unit], default=""), min(reads[unit], default="")


def _carried_out(
    order: Sequence[str], reads: Mapping[str, Sequence[str]], sizes: Mapping[str, int]
) -> Schedule:
    last = {file: unit for unit in order for file in reads[unit]}
    on_disk: set[str] = set()
    steps: list[ScheduleStep] = []
    for unit in order:
        fetch = tuple(sorted(set(reads[unit]) - on_disk))
        on_disk |= set(fetch)
        discard = tuple(sorted(file for file in on_disk if last[file] == unit))
        on_disk -= set(discard)
        steps.append(ScheduleStep(unit, fetch, discard))
    return Schedule(tuple(steps), _peak(steps, sizes), sum(sizes[file] for file in last))


def _peak(steps: Sequence[ScheduleStep], sizes: Mapping[str, int]) -> int:
    """The files of a step are kept while it runs; those of the next step are downloaded meanwhile."""
    held = peak = 0
    for i, step in enumerate(steps):
        if i == 0:
            held += sum(sizes[file] for file in step.fetch)
        ahead = steps[i + 1].fetch if i + 1 < len(steps) else ()
        held += sum(sizes[file] for file in ahead)
        peak = max(peak, held)
        held -= sum(sizes[file] for file in step.discard)
    return peak
