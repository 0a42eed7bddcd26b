"""One expert as one page: gate, up and down back to back in a fixed layout, padded so that one read brings it
whole.

Knows offsets only, no file and no layer. Views into a page buffer are made without copying.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from quant.formats.codec import PartSpec, Shape, codec

if TYPE_CHECKING:
    import torch

    from quant.formats.qtensor import QTensor

PAGE_ALIGN = 4096  # direct reads want whole sectors
PART_ALIGN = 64  # one cache line, one AVX-512 register
MATRICES = ("gate", "up", "down")


def align(offset: int, to: int) -> int:
    return -(-offset // to) * to


@dataclass(frozen=True)
class Expert:
    """The three matrices of an expert: y = down(silu(gate x) * up x)."""

    gate: QTensor
    up: QTensor
    down: QTensor


@dataclass(frozen=True)
class Slice:
    """The position of one part of one matrix in the page."""

    matrix: str
    part: str
    offset: int
    spec: PartSpec


@dataclass(frozen=True)
class PageLayout:
    """The layout of a page for experts [inner, hidden] x 2 and [hidden, inner] in one codec."""

    codec: str
    hidden: int
    inner: int

    def shape(self, matrix: str) -> Shape:
        return (self.hidden, self.inner) if matrix == "down" else (self.inner, self.hidden)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        out: list[Slice] = []
        offset = 0
        for matrix in MATRICES:
            for part, spec in codec(self.codec).parts(self.shape(matrix)).items():
                out.append(Slice(matrix, part, offset, spec))
                offset = align(offset + spec.nbytes, PART_ALIGN)
        return tuple(out)

    @cached_property
    def bytes(self) -> int:
        """Size of a page, padding included."""
        last = self.slices[-1]
        return align(last.offset + last.spec.nbytes, PAGE_ALIGN)

    def expert(self, buffer: torch.Tensor) -> Expert:
        """Zero-copy views of the parts in a page. buffer: uint8 [>= bytes], any device, 64-byte aligned."""
        from quant.formats.qtensor import DTYPES, QTensor

        parts: dict[str, dict[str, torch.Tensor]] = {matrix: {} for matrix in MATRICES}
        for s in self.slices:
            raw = buffer[s.offset : s.offset + s.spec.nbytes]
            parts[s.matrix][s.part] = raw.view(DTYPES[s.spec.dtype]).view(s.spec.shape)
        return Expert(**{m: QTensor(self.codec, self.shape(m), parts[m]) for m in MATRICES})
