"""Protocols: what the model needs of a KV cache, of the routed experts, and of a caller that may stop it.

Knows shapes only. Must not know how a cache is laid out or where an expert's bytes are.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from localmimo.model.attention import Rows


class LayerKV(Protocol):
    """One layer's keys and values of one sequence."""

    def next_rows(self, n: int) -> Rows:
        """Rows for the next n tokens; they also hold every earlier position that these tokens see."""

    def commit(self, rows: Rows, n: int) -> None:
        """The n tokens that `rows` was for are written."""


class Cache(Protocol):
    """The KV of one sequence: its length, and one LayerKV per layer."""

    length: int

    @property
    def layers(self) -> Sequence[LayerKV]: ...

    def reserve(self, n: int) -> None: ...

    def advance(self, n: int) -> None: ...


PredictNext = Callable[
    [], tuple[int, Tensor]
]  # (layer, chosen [n, k]) that the next MoE layer will probably use


class Experts(Protocol):
    """Runs the routed experts of a layer for x [n, hidden] -> float32 [n, hidden].

    `predict_next`, if given, runs the next MoE layer's router early, on this layer's input, so that those experts
    can be prefetched; it is called only where prefetching pays. A row's result depends on its own token, experts and
    weights alone.
    """

    def run(
        self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor, predict_next: PredictNext | None = None
    ) -> Tensor: ...


def nothing_to_check() -> None:
    """The default between-layers check: go on."""


def nothing_to_report(done: float) -> None:
    """The default report of progress."""
