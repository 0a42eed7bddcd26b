"""Watched: a pack whose dense tensors are read, and that says how far that has come.

Knows packs; nothing of what is read or of who listens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from localmimo.limits import MAX_DRAFTS

if TYPE_CHECKING:
    from torch import Tensor

    from quant import Pack, QTensor

OnProgress = Callable[[int, int], object]  # bytes read, bytes to read in all


class ReportedWeights:
    """Hands a pack's tensors on; n_heads draft heads are read, the others are not."""

    def __init__(self, pack: Pack, n_heads: int, hear: OnProgress) -> None:
        left_out = tuple(f"mtp.{k}." for k in range(n_heads, MAX_DRAFTS))
        sizes = {name: info.nbytes for name, info in pack.tensors.items()}
        self._sizes = {name: n_bytes for name, n_bytes in sizes.items() if not name.startswith(left_out)}
        self._total = sum(self._sizes.values())
        self._done = 0
        self._pack = pack
        self._hear = hear

    def tensor(self, name: str) -> QTensor | Tensor:
        """The pack's tensor; then the listener is told."""
        tensor = self._pack.tensor(name)
        self._done += self._sizes.get(name, 0)
        self._hear(self._done, self._total)
        return tensor
