"""Routed experts straight from their pages: y = down(silu(gate x) * up x), weighted. Reference and native.

Chooses between the native kernel and the reference. It must not know where pages are kept, or why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from quant import kernels
from quant.formats.page import Expert, PageLayout
from quant.ops.linear import linear

Tensor = torch.Tensor


def experts(
    x: Tensor,
    layout: PageLayout,
    pages: Sequence[Tensor],
    places: Tensor,
    spans: Sequence[int],
    weights: Tensor,
    out: Tensor,
) -> None:
    """Run experts and store each weighted output in its own row of `out`.

    x [n, hidden] float32 or bfloat16, contiguous. A place is token * k + i: the i-th of the k experts of a token, with
    the weight weights[token, i] (float32 [n, k]) and the row of that number in out (float32 [n * k, hidden]). Page e
    (uint8 [>= layout.bytes]) runs the places places[spans[2 e]:spans[2 e + 1]] (int64). An output depends on its
    token, page and weight alone.
    """
    if kernels.available() and layout.codec in kernels.FORMATS and x.is_cpu:
        kernels.routed(x, layout, pages, places, spans, weights, out)
    else:
        reference(x, layout, pages, places, spans, weights, out)


def reference(
    x: Tensor,
    layout: PageLayout,
    pages: Sequence[Tensor],
    places: Tensor,
    spans: Sequence[int],
    weights: Tensor,
    out: Tensor,
) -> None:
    """`experts`, one by one in torch."""
    k, shares = weights.shape[1], weights.reshape(-1, 1)
    for page, start, stop in zip(pages, spans[::2], spans[1::2], strict=True):
        chosen = places[start:stop]
        out[chosen] = run_expert(layout.expert(page), x[chosen // k]).float() * shares[chosen]


def in_order(terms: Tensor) -> Tensor:
    """The sum of terms float32 [n, k, hidden] over k, first to last, whatever adds them."""
    if kernels.available() and terms.is_cpu and terms.is_contiguous():
        return kernels.add_in_order(terms)
    return in_order_reference(terms)


def in_order_reference(terms: Tensor) -> Tensor:
    """`in_order` in torch."""
    total = terms[:, 0]
    for i in range(1, terms.shape[1]):
        total = total + terms[:, i]
    return total


def run_expert(expert: Expert, x: Tensor) -> Tensor:
    """down(silu(gate x) * up x) of x [n, hidden] in x.dtype."""
    return linear(F.silu(linear(x, expert.gate)) * linear(x, expert.up), expert.down)
