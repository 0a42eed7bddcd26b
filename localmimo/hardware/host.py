"""Host: what the computer has, as facts a plan can use. Probed, or described by hand. Knows no model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

RESERVE_BYTES = 2 << 30  # left to the system and to other programs when the budget is automatic


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


def _cgroup(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, int]:
    """Memory limit and use of the control group with the least room, of those that this process is in.

    What files occupy in the page cache counts as free: the system takes it back first.
    """
    found = [numbers for folder in _groups(root, own) if (numbers := _limit_and_use(folder)) is not None]
    return min(found, key=lambda numbers: numbers[0] - numbers[1], default=(1 << 62, 0))


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """The folders of the memory control groups of this process and of those around them, versions 1 and 2."""
    yield from (root, root / "memory")
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        bases = [root / "memory"] if "memory" in controllers.split(",") else [root, root / "unified"]
        if controllers and bases != [root / "memory"]:
            continue
        parts = Path(path.strip("/")).parts
        yield from (base.joinpath(*parts[:n]) for base in bases for n in range(1, len(parts) + 1))


def _limit_and_use(folder: Path) -> tuple[int, int] | None:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            numbers = int((folder / limit).read_text()), int((folder / used).read_text())
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
        return numbers[0], max(0, numbers[1] - _cached_bytes(folder))
    return None


def _cached_bytes(folder: Path) -> int:
    """Bytes of files in the page cache, from a control group's memory.stat."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(fields["active_file"]) + int(fields["inactive_file"])
    except (OSError, KeyError, ValueError):
        return 0
