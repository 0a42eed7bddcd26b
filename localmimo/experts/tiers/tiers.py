"""Tiers: memory for pages. A slab of equal slots in RAM, and whole-page reads from the pack's files.

A page is one expert's packed bytes. Knows offsets and bytes; not which page is worth keeping, nor what is in it.
"""

import errno
import mmap
import os
import threading
import time
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from localmimo.errors import BadModel
from localmimo.experts.tiers.io_threads import IoThreads, Job, Task
from localmimo.experts.tiers.pinning import Pinning
from localmimo.limits import N_READERS
from quant.files.hugepages import mapping
from quant.kernels import crc32
from quant.pack.pack import PageAt


class RamTier:
    """One slab of `n_slots` slots of `page_bytes` bytes, allocated once, each slot on a 4096-byte boundary.

    With `pinning`, a slot is locked for the GPU when it is first written.
    """

    def __init__(self, n_slots: int, page_bytes: int, pinning: Pinning | None = None) -> None:
        self.n_slots = n_slots
        self.page_bytes = page_bytes
        self._map = mapping(n_slots * page_bytes)
        self._bytes = memoryview(self._map)
        self._slots = torch.frombuffer(self._map, dtype=torch.uint8).view(n_slots, page_bytes).unbind()
        self._pinning = pinning

    def memory(self, slot: int) -> memoryview:
        """The slot's bytes, to read into."""
        if self._pinning is not None:
            self._pinning.lock(self._slots[slot].data_ptr(), self.page_bytes)
        return self._bytes[slot * self.page_bytes : (slot + 1) * self.page_bytes]

    def tensor(self, slot: int) -> Tensor:
        """The slot's bytes as uint8 [page_bytes], without a copy."""
        return self._slots[slot]

    def give_back(self, slot: int) -> None:
        """Return the slot's memory to the system; it comes back, empty, when it is next written."""
        if self._pinning is not None:
            self._pinning.unlock(self._slots[slot].data_ptr())  # a GPU would go on reading what was there
        self._map.madvise(mmap.MADV_DONTNEED, slot * self.page_bytes, self.page_bytes)


class GpuTier:
    """One slab of `n_slots` slots on a device, filled from RAM on a stream of its own.

    On the device "cpu" a copy is done when `fill` returns.
    """

    def __init__(self, n_slots: int, page_bytes: int, device: torch.device) -> None:
        self.n_slots = n_slots
        self.device = device
        self.slab = torch.empty(n_slots, page_bytes, dtype=torch.uint8, device=device)
        self.generation = 0  # of the slab
        self._stream = torch.cuda.Stream(device=device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fill(self, slot: int, page: Tensor) -> None:
        """Start copying a page from RAM; the page must stay as it is until `settle`."""
        if self._stream is None:
            self.slab[slot].copy_(page)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # who reads the slot now goes first
        with torch.cuda.stream(self._stream):
            self.slab[slot].copy_(page, non_blocking=True)

    def order(self) -> None:
        """What the device is given from now on waits for the copies begun so far; the host does not."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def settle(self) -> None:
        """Wait for the copies: their sources may be written again."""
        if self._stream is not None:
            self._stream.synchronize()

    def resize(self, n_slots: int, kept: Sequence[int]) -> bool:
        """Begin anew with fewer slots, or with as many of them as the device still has room for.

        What lies in the slots `kept` goes into the first ones; False where not even these could be had again.
        """
        page_bytes = self.slab.shape[1]
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        saved = self.slab[kept].cpu()
        self.generation += 1
        self.slab = self.slab.new_empty(0, page_bytes)
        while True:
            if self._stream is not None:
                torch.cuda.empty_cache()
            try:
                self.slab = self.slab.new_empty(n_slots, page_bytes)
                break
            except torch.OutOfMemoryError:
                n_slots = 0 if n_slots <= len(kept) else max(len(kept), n_slots // 2)
        self.n_slots = n_slots
        if n_slots >= len(kept):
            self.slab[: len(kept)].copy_(saved)
        return n_slots >= len(kept)


class DiskTier:
    """Reads whole pages from the pack's files with several threads, around the page cache where that is allowed.

    Every page is checked against its checksum the first time it is read, unless `trust`.
    """

    def __init__(self, n_readers: int = N_READERS, *, trust: bool = False) -> None:
        self.trust = trust
        self.direct = True  # until a file system refuses
        self._files: dict[Path, int] = {}
        self._verified: set[PageAt] = set()
        self._readers = IoThreads(n_readers)
        self._clock = threading.Lock()
        self._n_reading = 0
        self._began_s = 0.0
        self._busy_s = 0.0

    def read(self, page: PageAt, into: memoryview) -> Task:
        """Start reading `page` into a slot; the task's result raises BadModel where the bytes are not the page's."""
        return self._readers.demand(partial(self._read, page, into[: page.nbytes]))

    def prefetch(self, page: PageAt, into: memoryview, on_end: Job | None = None) -> Task:
        """The same once the disk has nothing better to do; a reader's thread calls `on_end` then."""
        return self._readers.prefetch(partial(self._read, page, into[: page.nbytes]), on_end)

    def cancel(self, read: Task) -> bool:
        """Take a read back; False where it has begun."""
        return self._readers.cancel(read)

    def wait(self, reads: Collection[Task], timeout_s: float | None, *, every: bool = False) -> bool:
        """Wait until one of the reads, or every one, is over; False when the time is."""
        return self._readers.wait(reads, timeout_s, every=every)

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one read was under way."""
        with self._clock:
            return self._busy_s + (time.perf_counter() - self._began_s if self._n_reading else 0.0)

    def _read(self, page: PageAt, into: memoryview) -> None:
        self._reading(1)
        try:
            self._fill(page, into)
        finally:
            self._reading(-1)
        self._verify(page, into)

    def _reading(self, change: int) -> None:
        with self._clock:
            now = time.perf_counter()
            if self._n_reading:
                self._busy_s += now - self._began_s
            self._began_s = now
            self._n_reading += change

    def _fill(self, page: PageAt, into: memoryview) -> None:
        done = 0
        while done < page.nbytes:
            n = self._read_some(page, into[done:], page.offset + done)
            if n == 0:
                raise BadModel(
                    f"{_where(page)} ends after {done:,} of {page.nbytes:,} bytes: the file was cut. Convert again."
                )
            done += n

    def _read_some(self, page: PageAt, into: memoryview, offset: int, *, again: bool = False) -> int:
        descriptor = self._open(page.file)
        try:
            return os.preadv(descriptor, [into], offset)
        except OSError as error:
            if error.errno == errno.EINVAL and not again:  # opened for direct reads, and now refuses this one
                self._reopen_buffered(page.file)
                return self._read_some(page, into, offset, again=True)
            raise BadModel(
                f"{_where(page)} cannot be read: {error.strerror}. Check the disk, then: localmimo verify."
            ) from error

    def _open(self, file: Path) -> int:
        with self._clock:
            if file not in self._files:
                self._files[file] = self._open_direct(file)
            return self._files[file]

    def _open_direct(self, file: Path) -> int:
        try:
            if self.direct:
                return os.open(file, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
        except FileNotFoundError:
            raise BadModel(f"{file} is gone: the pack was moved or deleted while it was open.") from None
        except OSError:
            self.direct = False  # tmpfs and some network mounts know no direct reads
        try:
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadModel(f"{file} cannot be opened: {error.strerror}.") from error

    def _reopen_buffered(self, file: Path) -> None:
        with self._clock:
            self.direct = False
            os.dup2(
                buffered := os.open(file, os.O_RDONLY | os.O_CLOEXEC), self._files[file], inheritable=False
            )
            os.close(buffered)

    def _verify(self, page: PageAt, into: memoryview) -> None:
        """Check a page against its checksum the first time it is read."""
        if self.trust or page in self._verified:
            return
        found = crc32(torch.frombuffer(into, dtype=torch.uint8))
        if found != page.crc32:
            raise BadModel(
                f"{_where(page)} has checksum {found:08x}, the manifest says {page.crc32:08x}: convert the pack again."
            )
        self._verified.add(page)

    def close(self) -> None:
        """Stop reading and close the files; a reader stuck in a stalled disk keeps its own until it returns."""
        if self._readers.close():
            for descriptor in self._files.values():
                os.close(descriptor)
        self._files.clear()


def _where(page: PageAt) -> str:
    return f"The page at byte {page.offset:,} of {page.file}"


def stalled(layer: int, expert: int, at: PageAt, seconds: float) -> BadModel:
    """What is said of a page whose read does not end."""
    return BadModel(
        f"The disk has given nothing for {seconds:.0f} s: expert {expert} of layer {layer}, "
        f"{at.nbytes:,} bytes at {at.offset:,} of {at.file}. Check the disk, then ask again."
    )
