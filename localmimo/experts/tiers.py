"""Tiers: places for pages. A slab of equal slots in RAM, and whole-page reads from the pack's files.

A page is one expert's packed bytes. Knows offsets and bytes; not which page is worth keeping, nor what is in it.
"""

import mmap
import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from localmimo.errors import BadModel
from quant.pack import PageAt

N_READERS = 4  # reads in flight; a SATA disk is busy with one, an NVMe drive with four reads of megabytes


class RamTier:
    """One slab of `n_slots` slots of `page_bytes` bytes, allocated once, each slot on a 4096-byte boundary."""

    def __init__(self, n_slots: int, page_bytes: int) -> None:
        self.n_slots = n_slots
        self.page_bytes = page_bytes
        self._map = mmap.mmap(-1, n_slots * page_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)  # small pages cost a streaming read most of its bandwidth
        self._bytes = memoryview(self._map)
        self._slab = torch.frombuffer(self._map, dtype=torch.uint8)

    def memory(self, slot: int) -> memoryview:
        """The slot's bytes, to read into."""
        return self._bytes[slot * self.page_bytes : (slot + 1) * self.page_bytes]

    def tensor(self, slot: int) -> Tensor:
        """The slot's bytes as uint8 [page_bytes], without a copy."""
        return self._slab[slot * self.page_bytes : (slot + 1) * self.page_bytes]


class DiskTier:
    """Reads whole pages from the pack's files with several threads, around the page cache where that is allowed."""

    def __init__(self, n_readers: int = N_READERS) -> None:
        self._files: dict[Path, int] = {}
        self._verified: set[PageAt] = set()
        self._readers = ThreadPoolExecutor(n_readers, thread_name_prefix="page-reader")
        self.direct = True  # until a file system refuses

    def read(self, page: PageAt, into: memoryview) -> "Future[None]":
        """Start reading `page` into a slot; the future raises BadModel where the bytes are not the page's."""
        return self._readers.submit(self._read, self._open(page.file), page, into[: page.nbytes])

    def _open(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = self._open_direct(file)
        return self._files[file]

    def _open_direct(self, file: Path) -> int:
        try:
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
        except FileNotFoundError:
            raise BadModel(f"{file} is gone: the pack was moved or deleted while it was open.") from None
        except OSError:
            self.direct = False  # tmpfs and some network mounts know no direct reads
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def _read(self, descriptor: int, page: PageAt, into: memoryview) -> None:
        done = 0
        while done < page.nbytes:
            try:
                n = os.preadv(descriptor, [into[done:]], page.offset + done)
            except OSError as error:
                raise BadModel(
                    f"{_where(page)} cannot be read: {error.strerror}. Check the disk, then: localmimo verify."
                ) from error
            if n == 0:
                raise BadModel(
                    f"{_where(page)} ends after {done:,} of {page.nbytes:,} bytes: the file was cut. Convert again."
                )
            done += n
        self._verify(page, into)

    def _verify(self, page: PageAt, into: memoryview) -> None:
        """Check a page against its checksum the first time it is read."""
        if page in self._verified:
            return
        found = zlib.crc32(into)
        if found != page.crc32:
            raise BadModel(
                f"{_where(page)} has checksum {found:08x}, the manifest says {page.crc32:08x}: convert the pack again."
            )
        self._verified.add(page)

    def close(self) -> None:
        """Stop reading and close the files."""
        self._readers.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def _where(page: PageAt) -> str:
    return f"The page at byte {page.offset:,} of {page.file}"
