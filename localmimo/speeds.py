"""Speeds: how fast this machine's disk and memory are, measured in a second or two, or said by the user.

Disk: whole pages by direct reads, one and four at a time, as the engine reads them. Memory: a sum over half a gigabyte
on every core. Measurements are kept under LOCALMIMO_HOME for a week. Knows files and bytes; no model and no torch.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from localmimo.home import home
from quant.aside import written_aside

N_READERS = 4  # reads in flight, as in `experts.tiers`
ALIGN = 4096
DISK_SAMPLE_S = 0.4  # per measurement
DISK_SAMPLE_BYTES = 1 << 30  # at most
SCRATCH_BYTES = 256 << 20
RAM_SAMPLE_BYTES = 512 << 20
FRESH_S = 7 * 86_400
CACHE = "speeds.json"

Origin = Literal["measured", "given", "assumed"]
Spot = tuple[Path, int]  # a file and an aligned offset in it


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes per second, and where the figures come from."""

    disk_read: float  # four pages at a time
    disk_read_alone: float  # one page at a time
    ram_read: float
    disk_origin: Origin = "assumed"
    ram_origin: Origin = "assumed"
    pcie: float = 25e9  # host to GPU: PCIe 4.0 x16
    gpu_read: float = 500e9
    layer_s: float | None = None  # a layer's time beyond its bytes; None: not measured
    direct: bool = True  # reads went around the page cache

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


ASSUMED = Speeds(disk_read=3e9, disk_read_alone=1.5e9, ram_read=40e9)


def measure_ram(n_threads: int, n_bytes: int = RAM_SAMPLE_BYTES) -> float:
    """Bytes per second that all cores together read from memory."""
    import numpy as np

    data = np.ones(n_bytes // 8, dtype=np.uint64)
    parts = np.array_split(data, n_threads)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        _together([lambda part=part: np.bitwise_or.reduce(part) for part in parts])  # type: ignore[misc]
        best = max(best, data.nbytes / (time.perf_counter() - began))
    return best


def _together(jobs: Sequence[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- disk ----


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """What reads of whole pages give, in bytes per second."""

    together: float
    alone: float
    direct: bool


def measure_disk(spots: Sequence[Spot], page_bytes: int, seed: int | None = None) -> DiskSpeed:
    """Read pages at random spots, one at a time and four at a time. Raises OSError where a file can not be read.

    No page is read twice: the second time it could come from the drive's own cache.
    """
    order = list(spots)
    random.Random(seed).shuffle(order)
    files = {file: _open(file) for file in {file for file, _ in order}}
    try:
        todo = iter(order)
        alone = _rate(files, _some(todo, len(order) // 4, page_bytes), page_bytes, 1)
        together = _rate(files, _some(todo, len(order), page_bytes), page_bytes, N_READERS)
    finally:
        for descriptor, _ in files.values():
            os.close(descriptor)
    return DiskSpeed(max(together, alone), alone, all(direct for _, direct in files.values()))


def scratch_spots(folder: Path, page_bytes: int) -> tuple[Path, list[Spot]]:
    """A file of random bytes in a folder, flushed to its disk, and the places to read it at. The caller deletes it."""
    page_bytes = -(-page_bytes // ALIGN) * ALIGN
    n_pages = max(8, SCRATCH_BYTES // page_bytes)
    descriptor, name = tempfile.mkstemp(prefix=".localmimo-speed-", dir=folder)
    noise = random.Random(0).randbytes(1 << 20)
    page = (noise * -(-page_bytes // len(noise)))[:page_bytes]
    with os.fdopen(descriptor, "wb", buffering=0) as out:
        for _ in range(n_pages):
            out.write(page)
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Path(name), [(Path(name), n * page_bytes) for n in range(n_pages)]


def file_spots(files: Sequence[Path], page_bytes: int) -> list[Spot]:
    """Aligned places in files that hold at least a page each."""
    step = -(-page_bytes // ALIGN) * ALIGN
    return [(file, start) for file in files for start in range(0, file.stat().st_size - step + 1, step)]


def _some(todo: Iterator[Spot], most: int, page_bytes: int) -> list[Spot]:
    n = max(1, min(most, DISK_SAMPLE_BYTES // page_bytes))
    return [spot for spot, _ in zip(todo, range(n), strict=False)]


def _open(file: Path) -> tuple[int, bool]:
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(file, flags | getattr(os, "O_DIRECT", 0)), hasattr(os, "O_DIRECT")
    except OSError:
        return os.open(file, flags), False  # tmpfs and some network mounts know no direct reads


def _rate(files: dict[Path, tuple[int, bool]], spots: list[Spot], page_bytes: int, readers: int) -> float:
    """Bytes per second of `readers` threads over these spots, for at most DISK_SAMPLE_S seconds."""
    size = -(-page_bytes // ALIGN) * ALIGN
    todo = iter(spots)
    lock, began = threading.Lock(), time.perf_counter()

    def reader() -> int:
        done = 0
        with mmap.mmap(-1, size) as memory, memoryview(memory) as view:
            while time.perf_counter() - began < DISK_SAMPLE_S or not done:
                with lock:
                    spot = next(todo, None)
                if spot is None:
                    break
                done += os.preadv(files[spot[0]][0], [view], spot[1])
        return done

    with ThreadPoolExecutor(readers) as pool:
        done = sum(pool.map(lambda _: reader(), range(readers)))
    return done / max(1e-9, time.perf_counter() - began)


# ---- kept measurements ----


def kept(key: str, *figures: str) -> dict[str, Any] | None:
    """A measurement of the last week under this key, where the file has these figures of it."""
    entry = _read().get(key)
    names = {"at", *figures}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), int | float) for name in names):
        return None
    return entry if 0 <= time.time() - entry["at"] < FRESH_S else None


def keep(key: str, figures: dict[str, Any]) -> None:
    """Remember a measurement; a home that can not be written is no reason to fail."""
    entries = _read() | {key: figures | {"at": time.time()}}
    try:
        with written_aside(home() / CACHE) as file:
            file.write(json.dumps(entries).encode())
    except OSError:
        pass


def _read() -> dict[str, Any]:
    try:
        entries = json.loads((home() / CACHE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def disk_speed(spots: Sequence[Spot], page_bytes: int, folder: Path, *, anew: bool = False) -> DiskSpeed:
    """Measured now or within the week, for the file system of `folder` at this size of page.

    Without spots a scratch file of 256 MiB is written there, read, and deleted.
    """
    key = f"disk {folder.stat().st_dev} {page_bytes}"
    had = None if anew else kept(key, "together", "alone", "direct")
    if had is None:
        had = asdict(_measure_at(spots, page_bytes, folder))
        keep(key, had)
    return DiskSpeed(float(had["together"]), float(had["alone"]), bool(had["direct"]))


def _measure_at(spots: Sequence[Spot], page_bytes: int, folder: Path) -> DiskSpeed:
    if len(spots) >= 8:
        return measure_disk(spots, page_bytes)
    scratch, spots = scratch_spots(folder, page_bytes)
    try:
        return measure_disk(spots, page_bytes)
    finally:
        scratch.unlink()


def ram_speed(n_threads: int, *, anew: bool = False) -> float:
    """Measured now or within the week."""
    had = None if anew else kept("ram", "read")
    if had is None:
        had = {"read": measure_ram(n_threads)}
        keep("ram", had)
    return float(had["read"])


def measured_speeds(
    spots: Sequence[Spot], page_bytes: int, folder: Path, n_threads: int, *, anew: bool = False
) -> Speeds:
    """This machine's speeds; what can not be measured here is assumed, and says so."""
    layer = kept("layer", "seconds")
    speeds = replace(
        ASSUMED,
        ram_read=ram_speed(n_threads, anew=anew),
        ram_origin="measured",
        layer_s=float(layer["seconds"]) if layer else None,
    )
    try:
        disk = disk_speed(spots, page_bytes, folder, anew=anew)
    except OSError:
        return speeds
    return replace(
        speeds,
        disk_read=disk.together,
        disk_read_alone=disk.alone,
        disk_origin="measured",
        direct=disk.direct,
    )
