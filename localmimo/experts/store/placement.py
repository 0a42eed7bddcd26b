"""Placement: where a running engine has its pages, in a small file that other processes can read.

The file stands beside the profile while the engine is open: `stats` reads it. Knows pages and tiers; no bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from localmimo.experts.policy.router_stats import Page
from quant.files.atomic import written_aside
from quant.files.bounded import read_small

LETTERS = {"ram": "r", "gpu": "g"}  # of a page's tier; any other letter: on disk alone
MOST_BYTES = 1 << 20
MOST_PID = (1 << 31) - 1  # larger numbers are no process's
UNUSABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Placement:
    """What one process holds: layer -> a letter per expert."""

    pid: int
    tiers: Mapping[int, str]

    def count(self, layer: int, tier: str) -> int:
        """Experts of a layer that lie in a tier, "ram" or "gpu"."""
        return self.tiers.get(layer, "").count(LETTERS[tier])


def publish(profile: Path, where: Mapping[Page, str], n_experts: Mapping[int, int]) -> None:
    """Say where this process has its pages; n_experts: layer -> how many there are. Raises OSError."""
    tiers = {
        layer: "".join(LETTERS.get(where.get((layer, expert), ""), ".") for expert in range(n))
        for layer, n in n_experts.items()
    }
    profile.parent.mkdir(parents=True, exist_ok=True)
    said = {"pid": os.getpid(), "began": _began(os.getpid()), "tiers": tiers}
    with written_aside(_path(profile, os.getpid())) as file:
        file.write(json.dumps(said).encode())


def withdraw(profile: Path) -> None:
    """This process holds nothing any more; nor do those that were killed before they could say so."""
    for pid, path in _files(profile):
        if pid == os.getpid() or not psutil.pid_exists(pid):
            with suppress(OSError):
                path.unlink()


def running(profile: Path, n_experts: Mapping[int, int]) -> list[Placement]:
    """What the processes that have this profile open hold now; files of dead ones and unusable files do not count."""
    found = [_read(path, n_experts) for _, path in sorted(_files(profile))]
    return [placement for placement in found if placement is not None]


def _files(profile: Path) -> Iterator[tuple[int, Path]]:
    """Every process that said something of this profile; "code.2" is a profile of its own beside "code"."""
    for path in profile.parent.glob(f"{profile.stem}.*.placement"):
        pid = path.name.removeprefix(f"{profile.stem}.").removesuffix(".placement")
        if pid.isascii() and pid.isdecimal() and len(pid) <= 10 and int(pid) <= MOST_PID:
            yield int(pid), path


def _path(profile: Path, pid: int) -> Path:
    return profile.with_name(f"{profile.stem}.{pid}.placement")


def _read(path: Path, n_experts: Mapping[int, int]) -> Placement | None:
    try:
        said = json.loads(read_small(path, MOST_BYTES))
        pid, tiers = int(said["pid"]), {int(layer): str(row) for layer, row in said["tiers"].items()}
        lives = _began(pid) == said["began"]
    except (*UNUSABLE, psutil.Error):
        return None
    fits = {layer: len(row) for layer, row in tiers.items()} == dict(n_experts)
    return Placement(pid, tiers) if lives and fits else None


def _began(pid: int) -> float:
    """When a process began: its number may be another one's later. Raises psutil.Error where there is none."""
    return float(psutil.Process(pid).create_time())
