"""Memory in huge pages, where the system has them, for weights that are read over and over. It knows bytes only.

Reading through pages of 4 KiB, a core waits at the end of each for an address translation, and prefetchers stop: on Zen
4 one core reads 18 GB/s that way, 26 to 30 from pages of 2 MiB. Small tensors, as a matrix's scales are, share a
mapping, which is kept as long as one of them.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHARED_BYTES = 8 << 20  # a mapping for small pieces
MIN_OWN_BYTES = (
    SHARED_BYTES // 2
)  # from this size on a tensor has a mapping of its own: little of it is wasted
LINE = 64


class _Shared:
    """The mapping that small pieces are cut from, one after the other, and how much of it is taken."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.memory: mmap.mmap | None = None
        self.taken = SHARED_BYTES

    def cut(self, nbytes: int) -> tuple[mmap.mmap, int]:
        """A mapping, and the offset of nbytes in it that are free."""
        with self.lock:
            if self.memory is None or self.taken + nbytes > SHARED_BYTES:
                self.memory, self.taken = mapping(SHARED_BYTES), 0
            at, self.taken = self.taken, self.taken + -(-nbytes // LINE) * LINE
            return self.memory, at


_shared = _Shared()


def allocate(nbytes: int) -> torch.Tensor:
    """A uint8 tensor [nbytes] of memory of its own, its content undefined."""
    import torch

    if nbytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    memory, at = (mapping(nbytes), 0) if nbytes >= MIN_OWN_BYTES else _shared.cut(nbytes)
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=at)


def mapping(nbytes: int, *, huge: bool = True) -> mmap.mmap:
    """Memory of the process alone, none of it taken before it is touched; in huge pages where there are any."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
