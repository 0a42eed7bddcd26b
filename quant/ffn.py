"""Routed experts straight from their pages: y = down(silu(gate x) * up x), weighted. Reference and native.

The one place where the native expert kernel is plugged in. Knows pages as bytes; not where they lie or why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from quant import kernels
from quant.matmul import linear
from quant.page import Expert, PageLayout

Tensor = torch.Tensor


def experts(
    x: Tensor,
    layout: PageLayout,
    pages: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weights: Sequence[Tensor],
    out: Tensor,
    rows: Sequence[Tensor],
) -> None:
    """Run experts and store each weighted output in its own row of `out`.

    x [n, hidden] float32 or bfloat16; expert e has the page pages[e] (uint8 [>= layout.bytes]) and works on the rows
    tokens[e] of x; its output, times weights[e] (float32, one per token), goes to the rows rows[e] of out (float32
    [m, hidden]). An output depends on its token, page and weight alone.
    """
    if kernels.available() and layout.codec in kernels.FORMATS:
        kernels.experts(x, layout, pages, tokens, weights, out, rows)
    else:
        reference(x, layout, pages, tokens, weights, out, rows)


def reference(
    x: Tensor,
    layout: PageLayout,
    pages: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weights: Sequence[Tensor],
    out: Tensor,
    rows: Sequence[Tensor],
) -> None:
    """`experts`, one by one in torch."""
    for page, token, weight, row in zip(pages, tokens, weights, rows, strict=True):
        out[row] = run_expert(layout.expert(page), x[token]).float() * weight[:, None]


def run_expert(expert: Expert, x: Tensor) -> Tensor:
    """down(silu(gate x) * up x) of x [n, hidden] in x.dtype."""
    return linear(F.silu(linear(x, expert.gate)) * linear(x, expert.up), expert.down)
