"""How far packed weights are from their source: sums of squares that add up over rows, matrices and
layers."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SLICE = (
    1 << 14
)  # below torch's threshold for splitting a sum between threads: the order of summation stays fixed


@dataclass(frozen=True)
class Distortion:
    """Squared error and squared norm of some weights; `rms` is the relative root-mean-square error."""

    squared_error: float = 0.0
    squared_norm: float = 0.0

    def __add__(self, other: Distortion) -> Distortion:
        return Distortion(self.squared_error + other.squared_error, self.squared_norm + other.squared_norm)

    @property
    def rms(self) -> float:
        return sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def sum_of_squares(x: torch.Tensor) -> float:
    """Sum of squares in float64, the same whatever the number of threads."""
    flat = x.reshape(-1)
    total = 0.0
    for start in range(0, flat.numel(), SLICE):
        total += float(flat[start : start + SLICE].double().square_().sum())
    return total
