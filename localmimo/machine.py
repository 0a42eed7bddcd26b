"""Machine: what the computer has, as facts a plan can use. Probed, or described by hand. Knows no model."""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from localmimo.errors import BadRequest

RESERVE_BYTES = 2 << 30  # left to the system and to other programs when the budget is automatic
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class Machine:
    """One workstation."""

    ram_bytes: int  # installed, or the control group's limit
    free_ram_bytes: int  # that can be had now without swapping
    n_cores: int

    @classmethod
    def probe(cls) -> "Machine":
        """This machine, now."""
        memory = psutil.virtual_memory()
        limit, used = _cgroup()
        return cls(
            ram_bytes=min(memory.total, limit),
            free_ram_bytes=max(0, min(memory.available, limit - used)),
            n_cores=len(psutil.Process().cpu_affinity())
            if hasattr(psutil.Process, "cpu_affinity")
            else psutil.cpu_count() or 1,
        )

    @property
    def automatic_ram_bytes(self) -> int:
        """The RAM budget where none is given: what is free, less a reserve of 2 GiB or a tenth."""
        return max(0, self.free_ram_bytes - max(RESERVE_BYTES, self.free_ram_bytes // 10))


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Memory limit and use of the control group (version 2, then 1), where there is one.

    What files occupy in the page cache counts as free: the system takes it back first.
    """
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            cached = _cached_bytes(root / limit)
            return int((root / limit).read_text()), max(0, int((root / used).read_text()) - cached)
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return 1 << 62, 0


def _cached_bytes(limit: Path) -> int:
    """Bytes of files in the page cache, from the memory.stat beside a control group's limit."""
    try:
        fields = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        return int(fields["active_file"]) + int(fields["inactive_file"])
    except (OSError, KeyError, ValueError):
        return 0


def parse_bytes(size: str | int | float) -> int:
    """Bytes of "22GiB", "96GB", "512MiB", "1e9" or a number. GB is 10^9, GiB 2^30, a bare G is GiB."""
    if isinstance(size, int | float):
        return int(size)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]?)(i?b)?\s*", size.lower())
    if match is None:
        raise BadRequest(f'"{size}" is not a size: write it like 22GiB, 96GB or 512MiB.')
    number, prefix, suffix = match.groups()
    return int(float(number) * (1000 if suffix == "b" else 1024) ** _UNITS[prefix])


def format_bytes(size: float) -> str:
    """A size for people: 13.4 GB, 912 MB, 3 kB (powers of ten)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale * 0.9995:
            digits = 1 if size < 100 * scale else 0
            return f"{size / scale:.{digits}f} {unit}"
    return f"{size / 1e3:.0f} kB"
