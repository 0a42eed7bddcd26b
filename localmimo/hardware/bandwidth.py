"""Bandwidth: how fast this machine's disk and memory are, measured in a second or two, or given by the user.

Disk: whole pages by direct reads into huge pages, one and four at a time, as the engine reads them; then the same ones
again, which a cache in the drive or in a virtual machine's host may answer. Memory: a sum over half a gigabyte on every
core. Measurements are kept under LOCALMIMO_HOME for a week. Knows files and bytes; no model and no torch.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from localmimo.hardware.measurements import keep, kept
from localmimo.limits import N_READERS
from quant.files.hugepages import mapping

ALIGN = 4096
DISK_SAMPLE_S = 0.4  # per measurement
DISK_LEAST_READS = 16  # however long they take, up to DISK_MOST_S: one read that waited says nothing
DISK_MOST_S = 3.0
DISK_SAMPLE_BYTES = 1 << 30  # at most
SCRATCH_BYTES = 256 << 20
RAM_SAMPLE_BYTES = 512 << 20
CACHED = 1.25  # times faster, the second time: then a cache answers

Origin = Literal["measured", "given", "assumed"]
Spot = tuple[Path, int]  # a file and an aligned offset in it


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes per second, and where the figures come from."""

    disk_read: float  # four pages at a time, read for the first time
    disk_read_alone: float  # one page at a time
    ram_read: float
    disk_again: float = 0.0  # four at a time, read shortly before; as fast as the first time at least
    disk_origin: Origin = "assumed"
    ram_origin: Origin = "assumed"
    pcie: float = 25e9  # host to GPU: PCIe 4.0 x16
    gpu_read: float = 500e9
    products: float | None = None  # of packed weights under the kernels, one token; None: not measured
    layer_s: float | None = None  # a layer's time beyond its bytes; None: not measured
    direct: bool = True  # reads went around the page cache

    @property
    def gain_again(self) -> float:
        """How much faster pages come that were read shortly before."""
        return max(1.0, self.disk_again / self.disk_read)

    @property
    def disk_cached(self) -> bool:
        """Whether a cache answers what was read shortly before: the drive's, or that of a virtual machine's host."""
        return self.gain_again >= CACHED

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"disk_cached": self.disk_cached}


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
    again: float  # together, of pages that were read just before
    direct: bool


def measure_disk(spots: Sequence[Spot], page_bytes: int, seed: int | None = None) -> DiskSpeed:
    """Read pages at random spots, one at a time and four at a time, and the latter again.

    Raises OSError where a file can not be read. No page is read for the second time before all are read once.
    """
    order = list(spots)
    random.Random(seed).shuffle(order)
    cut = len(order) // 4
    with _Opened({file for file, _ in order}, page_bytes) as disk:
        _, alone = disk.read(order[:cut] or order, 1)
        read, together = disk.read(order[cut:], N_READERS)
        _, again = disk.read(read, N_READERS)
    together = max(together, alone)
    return DiskSpeed(together, alone, max(again, together), disk.direct)


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


class _Opened:
    """Files open for direct reads, and memory to read pages into."""

    def __init__(self, files: Collection[Path], page_bytes: int) -> None:
        self._size = -(-page_bytes // ALIGN) * ALIGN
        opened = {file: _open(file) for file in files}
        self._files = {file: descriptor for file, (descriptor, _) in opened.items()}
        self.direct = all(direct for _, direct in opened.values())
        self._memory = mapping(N_READERS * self._size)  # reads into small pages take half as long again
        for start in range(0, len(self._memory), ALIGN):
            self._memory[start] = 1  # that it is there before the clock runs

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, spots: Sequence[Spot], n_readers: int) -> tuple[list[Spot], float]:
        """Read these pages for DISK_SAMPLE_S seconds, longer where few came: which ones, and bytes per second."""
        todo = iter(spots[: max(1, DISK_SAMPLE_BYTES // self._size)])
        read: list[Spot] = []
        lock, began = threading.Lock(), time.perf_counter()

        def reader(number: int) -> int:
            n_bytes, start = 0, number * self._size
            with memoryview(self._memory) as whole, whole[start : start + self._size] as view:
                while _goes_on(time.perf_counter() - began, len(read)):
                    with lock:
                        if (spot := next(todo, None)) is None:
                            break
                        read.append(spot)
                    n_bytes += os.preadv(self._files[spot[0]], [view], spot[1])
            return n_bytes

        with ThreadPoolExecutor(n_readers) as pool:
            n_bytes = sum(pool.map(reader, range(n_readers)))
        return read, n_bytes / max(1e-9, time.perf_counter() - began)


def _goes_on(spent_s: float, n_read: int) -> bool:
    enough = DISK_SAMPLE_S if n_read >= DISK_LEAST_READS else DISK_MOST_S
    return not n_read or spent_s < enough


def _open(file: Path) -> tuple[int, bool]:
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(file, flags | getattr(os, "O_DIRECT", 0)), hasattr(os, "O_DIRECT")
    except OSError:
        return os.open(file, flags), False  # tmpfs and some network mounts know no direct reads


# ---- kept measurements ----


def disk_speed(spots: Sequence[Spot], page_bytes: int, folder: Path, *, anew: bool = False) -> DiskSpeed:
    """Measured now or within the week, for the file system of `folder` at this size of page.

    Without spots a scratch file of 256 MiB is written there, read, and deleted.
    """
    key = f"disk {folder.stat().st_dev} {page_bytes}"
    had = None if anew else kept(key, "together", "alone", "again", "direct")
    if had is None:
        had = asdict(_measure_at(spots, page_bytes, folder))
        keep(key, had)
    return DiskSpeed(float(had["together"]), float(had["alone"]), float(had["again"]), bool(had["direct"]))


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


def products_key(page_bytes: int) -> str:
    """Under which the speed of products with pages of this size is kept."""
    return f"products {page_bytes}"


def measured_speeds(
    spots: Sequence[Spot],
    page_bytes: int,
    folder: Path,
    n_threads: int,
    *,
    anew: bool = False,
    disk: bool = True,
) -> Speeds:
    """This machine's speeds; what can not be measured here is assumed, and says so: without `disk` its speed too."""
    layer, products = kept("layer", "seconds"), kept(products_key(page_bytes), "read")
    speeds = replace(
        ASSUMED,
        ram_read=ram_speed(n_threads, anew=anew),
        ram_origin="measured",
        layer_s=float(layer["seconds"]) if layer else None,
        products=float(products["read"]) if products else None,
    )
    if not disk:
        return speeds
    try:
        found = disk_speed(spots, page_bytes, folder, anew=anew)
    except OSError:
        return speeds
    return replace(
        speeds,
        disk_read=found.together,
        disk_read_alone=found.alone,
        disk_again=found.again,
        disk_origin="measured",
        direct=found.direct,
    )
