"""Weights: the dense tensors of the main model and of its draft heads, and how they are read from a pack.

Knows tensor names and types. Must not know sequences, budgets or where the routed experts are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from localmimo.limits import MAX_DRAFTS
from localmimo.model.config import LayerSpec, ModelConfig
from quant import Pack, QTensor

OnProgress = Callable[[int, int], object]  # bytes read, bytes to read in all


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    qkv: QTensor  # rows: all Q heads, all K heads, all V heads
    o: QTensor
    sink: Tensor | None  # [heads]


@dataclass(frozen=True, slots=True)
class MlpWeights:
    gate: QTensor
    up: QTensor
    down: QTensor


@dataclass(frozen=True, slots=True)
class RouterWeights:
    weight: Tensor  # [experts, hidden]
    bias: Tensor  # [experts], for the choice alone


@dataclass(frozen=True, slots=True)
class BlockWeights:
    attn_norm: Tensor
    mlp_norm: Tensor
    attention: AttentionWeights
    mlp: MlpWeights | RouterWeights


@dataclass(frozen=True, slots=True)
class Weights:
    embed: Tensor  # [vocab, hidden]
    norm: Tensor
    head: QTensor
    blocks: tuple[BlockWeights, ...]


class DenseSource(Protocol):
    """Where dense tensors come from: a pack."""

    def tensor(self, name: str) -> QTensor | Tensor: ...


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A source whose tensors are brought to a device as they are read; a token reads one row of the embeddings, which
    stay in main memory."""

    source: DenseSource
    device: torch.device

    def tensor(self, name: str) -> QTensor | Tensor:
        tensor = self.source.tensor(name)
        return tensor if name == "embed" else tensor.to(self.device)


class ReportedWeights:
    """Hands a pack's tensors on; n_heads draft heads are read, the others are not."""

    def __init__(self, pack: Pack, n_heads: int, on_progress: OnProgress) -> None:
        left_out = tuple(f"mtp.{k}." for k in range(n_heads, MAX_DRAFTS))
        sizes = {name: info.nbytes for name, info in pack.tensors.items()}
        self._sizes = {name: n_bytes for name, n_bytes in sizes.items() if not name.startswith(left_out)}
        self._total = sum(self._sizes.values())
        self._done = 0
        self._pack = pack
        self._on_progress = on_progress

    def tensor(self, name: str) -> QTensor | Tensor:
        """The pack's tensor; reports the bytes read so far."""
        tensor = self._pack.tensor(name)
        self._done += self._sizes.get(name, 0)
        self._on_progress(self._done, self._total)
        return tensor


def load_weights(source: DenseSource, config: ModelConfig) -> Weights:
    """Read every dense tensor of the main model (not the MTP blocks)."""
    return Weights(
        embed=_plain(source, "embed"),
        norm=_wide(source, "norm"),
        head=_packed(source, "head"),
        blocks=tuple(load_block(source, f"layers.{i}", spec) for i, spec in enumerate(config.layers)),
    )


def _plain(source: DenseSource, name: str) -> Tensor:
    tensor = source.tensor(name)
    return tensor if isinstance(tensor, Tensor) else tensor.parts["weight"]


def _wide(source: DenseSource, name: str) -> Tensor:
    """Norms, sinks and routers, which are computed in float32."""
    return _plain(source, name).float().contiguous()


def _packed(source: DenseSource, name: str) -> QTensor:
    tensor = source.tensor(name)
    assert isinstance(tensor, QTensor), name
    return tensor


def load_block(source: DenseSource, prefix: str, spec: LayerSpec) -> BlockWeights:
    """One block of the main model, or of a draft head: "layers.3", "mtp.0"."""
    sink = _wide(source, f"{prefix}.attn.sink") if spec.sink else None
    attention = AttentionWeights(
        _packed(source, f"{prefix}.attn.qkv"), _packed(source, f"{prefix}.attn.o"), sink
    )
    mlp = _mlp(source, f"{prefix}.mlp") if spec.mlp == "dense" else _router(source, f"{prefix}.router")
    return BlockWeights(
        _wide(source, f"{prefix}.attn_norm"), _wide(source, f"{prefix}.mlp_norm"), attention, mlp
    )


def _mlp(source: DenseSource, prefix: str) -> MlpWeights:
    return MlpWeights(*(_packed(source, f"{prefix}.{part}") for part in ("gate", "up", "down")))


def _router(source: DenseSource, prefix: str) -> RouterWeights:
    return RouterWeights(_wide(source, f"{prefix}.weight"), _wide(source, f"{prefix}.bias"))
