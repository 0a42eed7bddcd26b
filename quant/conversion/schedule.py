"""In which order the units of a conversion are made when the source comes file by file, and how much lies about.

A unit can start when all files that it reads are here; a file can go when all units that read it are done. Pure: names
and sizes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleStep:
    """One unit: what must be fetched before it, what may be discarded after it."""

    unit: str
    fetch: tuple[str, ...]
    discard: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """All units in order. `peak_bytes`: of source files here at a time, with the next step's fetched ahead."""

    steps: tuple[ScheduleStep, ...]
    peak_bytes: int
    fetch_bytes: int


def make_schedule(reads: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> Schedule:
    """Order units so that few source bytes lie on disk at a time.

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
    left, here, order = dict(reads), set[str](), []
    while left:
        unit = min(left, key=lambda name: sum(sizes[file] for file in set(left[name]) - here))
        here |= set(left.pop(unit))
        order.append(unit)
    return order


def _last_file(unit: str, reads: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    return max(reads[unit], default=""), min(reads[unit], default="")


def _carried_out(
    order: Sequence[str], reads: Mapping[str, Sequence[str]], sizes: Mapping[str, int]
) -> Schedule:
    last = {file: unit for unit in order for file in reads[unit]}
    here: set[str] = set()
    steps: list[ScheduleStep] = []
    for unit in order:
        fetch = tuple(sorted(set(reads[unit]) - here))
        here |= set(fetch)
        discard = tuple(sorted(file for file in here if last[file] == unit))
        here -= set(discard)
        steps.append(ScheduleStep(unit, fetch, discard))
    return Schedule(tuple(steps), _peak(steps, sizes), sum(sizes[file] for file in last))


def _peak(steps: Sequence[ScheduleStep], sizes: Mapping[str, int]) -> int:
    """Files of a step are here while it runs, and those of the next step that fetches anything arrive meanwhile."""
    held = peak = 0
    for i, step in enumerate(steps):
        if i == 0:
            held += sum(sizes[file] for file in step.fetch)
        ahead = steps[i + 1].fetch if i + 1 < len(steps) else ()
        held += sum(sizes[file] for file in ahead)
        peak = max(peak, held)
        held -= sum(sizes[file] for file in step.discard)
    return peak
