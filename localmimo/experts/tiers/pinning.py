"""Pinning: locks parts of main memory, so that a GPU copies from them by itself while the host continues.

Knows addresses and bytes. Where the system refuses, everything works, only slower: it says so and does not try again.
"""

from contextlib import suppress

import torch

PORTABLE = 1  # for every GPU, whichever the thread is on


class Pinning:
    """What is locked, by address."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        self._locked: set[int] = set()
        self.refused = False

    def lock(self, address: int, nbytes: int) -> None:
        """Lock a stretch, once, unless the system has refused before."""
        if self.refused or address in self._locked:
            return
        self.refused = int(self._runtime.cudaHostRegister(address, nbytes, PORTABLE)) != 0
        if not self.refused:
            self._locked.add(address)
            return
        with suppress(RuntimeError):  # the refusal stays behind as the last error, for whoever launches next
            torch.zeros(1, device=self._device)

    def unlock(self, address: int) -> None:
        """The stretch may be given back to the system."""
        if address in self._locked:
            self._locked.remove(address)
            self._runtime.cudaHostUnregister(address)

    def close(self) -> None:
        """Unlock everything."""
        for address in list(self._locked):
            self.unlock(address)
