"""Attention of a layer with the norms and the router, or the dense MLP, around it: one native call instead of nine.

The same arithmetic as the parts called one by one. Weights are checked once, when a Block is made; it keeps them.
Knows no sequence and no cache beyond the rows that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from quant import kernels
from quant.formats.codec import ROW_SCALE_BYTES
from quant.kernels.attention import EVERYTHING, MAX_HEAD_DIM, STORES, floats, in_rows

if TYPE_CHECKING:
    from quant.formats.qtensor import QTensor

Tensor = torch.Tensor
Choice = tuple[Tensor, Tensor, Tensor]  # normed [n, hidden], chosen [n, k], weights [n, k]


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The shape of a layer's attention."""

    heads: int
    kv_heads: int
    d_k: int
    d_v: int
    window: int | None

    @property
    def qkv_rows(self) -> int:
        return self.heads * self.d_k + self.kv_heads * (self.d_k + self.d_v)


@dataclass(frozen=True, slots=True)
class Router:
    """Weights [experts, hidden] and bias [experts] in float32; `rounded`: its input is rounded to bf16."""

    weight: Tensor
    bias: Tensor
    top_k: int
    scale: float
    normalise: bool
    rounded: bool


@dataclass(frozen=True, slots=True)
class Span:
    """n rows of one sequence: see `quant.kernels.attention.attend`."""

    n: int
    position: int
    cos: Tensor
    sin: Tensor
    keys: Tensor
    values: Tensor
    first: int


class FusedBlock:
    """One layer's weights, ready for the native call."""

    def __init__(
        self,
        heads: HeadShape,
        qkv: QTensor,
        o: QTensor,
        attn_norm: Tensor,
        mlp_norm: Tensor,
        sink: Tensor | None,
        rest: Router | tuple[QTensor, QTensor, QTensor],
        *,
        eps: float,
        value_scale: float,
    ) -> None:
        hidden = attn_norm.numel()
        if qkv.shape != (heads.qkv_rows, hidden) or o.shape != (hidden, heads.heads * heads.d_v):
            raise ValueError(f"{heads} do not go with matrices of {qkv.shape} and {o.shape}.")
        if max(heads.d_k, heads.d_v) > MAX_HEAD_DIM or heads.heads % heads.kv_heads:
            raise ValueError(f"No native attention serves {heads}.")
        self._heads, self._hidden = heads, hidden
        self._k = rest.top_k if isinstance(rest, Router) else 0
        plain = [attn_norm, mlp_norm, *([sink] if sink is not None else [])]
        matrices = [qkv, o]
        sizes: list[Any] = [hidden, heads.heads, heads.kv_heads, heads.d_k, heads.d_v]
        sizes.append(heads.window or EVERYTHING)
        if isinstance(rest, Router):
            plain += [rest.weight, rest.bias]
            if rest.weight.shape != (rest.bias.numel(), hidden) or not 0 < rest.top_k <= rest.bias.numel():
                raise ValueError(f"A router of {list(rest.weight.shape)} chooses no {rest.top_k} experts.")
            router = (rest.bias.numel(), rest.top_k, rest.weight.data_ptr(), rest.bias.data_ptr(), rest.scale,
                      rest.normalise, rest.rounded)  # fmt: skip
        else:
            matrices += rest
            router = (0, 0, 0, 0, 0.0, False, False)
        _check(plain, hidden, heads, sink, matrices)
        self._kept = (plain, [kernels._checked_parts(q) for q in matrices])
        addresses = [attn_norm.data_ptr(), mlp_norm.data_ptr(), 0 if sink is None else sink.data_ptr()]
        self._native = kernels._native.Block(
            sizes, [eps, heads.d_k**-0.5, value_scale], addresses, [_matrix(q) for q in matrices], *router
        )

    def run(self, x: Tensor, spans: Sequence[Span]) -> Choice | None:
        """Take x float32 [n, hidden], the spans' rows one after the other, through the layer up to its experts.

        x becomes the residual stream there, or behind the dense MLP; returns what the experts are to do, if any.
        """
        n = x.shape[0]
        if x.shape[1:] != (self._hidden,) or x.dtype is not torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}; contiguous float32 rows of {self._hidden} were expected."
            )
        if sum(span.n for span in spans) != n:
            raise ValueError(f"x has {n} rows, its spans {[span.n for span in spans]}.")
        places = [number for span in spans for number in self._place(span)]
        if not self._k:
            self._native.run(places, x.data_ptr(), 0, 0, 0)
            return None
        normed = torch.empty_like(x)
        chosen, weights = torch.empty(n, self._k, dtype=torch.int64), torch.empty(n, self._k)
        self._native.run(places, x.data_ptr(), normed.data_ptr(), chosen.data_ptr(), weights.data_ptr())
        return normed, chosen, weights

    def _place(self, span: Span) -> tuple[int, ...]:
        keys, values, half, heads = span.keys, span.values, span.cos.shape[1], self._heads
        extra = ROW_SCALE_BYTES if keys.dtype is torch.int8 else 0
        kv_heads, rows, width = keys.shape
        fits = (
            kv_heads == heads.kv_heads
            and width == heads.d_k + extra
            and values.shape == (kv_heads, rows, heads.d_v + extra)
            and keys.dtype is values.dtype
            and keys.dtype in STORES
            and span.cos.shape == span.sin.shape == (span.n, half)
            and 2 * half <= heads.d_k
            and in_rows(span.n, span.position, heads.window or EVERYTHING, span.first, rows)
            and keys.is_contiguous()
            and values.is_contiguous()
            and floats(span.cos, span.sin)
        )
        if not fits:
            raise ValueError(
                f"{span.n} rows at position {span.position} do not go with keys {list(keys.shape)} and values "
                f"{list(values.shape)} in {keys.dtype}, cos and sin {list(span.cos.shape)}, {heads}."
            )
        return (
            span.n, span.position, span.cos.data_ptr(), span.sin.data_ptr(), 2 * half, STORES[keys.dtype],
            keys.data_ptr(), values.data_ptr(), rows, span.first,
        )  # fmt: skip


def serves(*matrices: QTensor) -> bool:
    """Whether a Block can be made of such matrices."""
    return kernels.available() and all(
        q.codec in kernels.FORMATS and q.device.type == "cpu" for q in matrices
    )


def _check(
    plain: Sequence[Tensor], hidden: int, heads: HeadShape, sink: Tensor | None, matrices: Sequence[QTensor]
) -> None:
    if any(t.dtype is not torch.float32 or not t.is_contiguous() or not t.is_cpu for t in plain):
        raise ValueError("Norms, sink and router must be contiguous float32 in main memory.")
    if any(t.numel() != hidden for t in plain[:2]) or (sink is not None and sink.numel() != heads.heads):
        raise ValueError(f"The norms or the sink are not of {hidden} columns and {heads.heads} heads.")
    if len(matrices) == 5:
        gate, up, down = (q.shape for q in matrices[2:])
        if gate != up or gate[1] != hidden or down != (hidden, gate[0]):
            raise ValueError(f"An MLP of {gate}, {up} and {down} does not go with {hidden} columns.")


def _matrix(q: QTensor) -> Any:
    parts = [part.data_ptr() for part in kernels._checked_parts(q)]
    return kernels._native.Matrix(kernels.FORMATS[q.codec], *q.shape, *parts, *([0] * (3 - len(parts))))
