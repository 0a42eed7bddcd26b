"""Random packed weights and slabs of pages, and the float64 truth about them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quant.formats.page import Expert, PageLayout
from quant.formats.qtensor import QTensor
from quant.ops.quantize import quantize

Tensor = torch.Tensor


def random_matrix(codec: str, rows: int, cols: int, seed: int) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(rows, cols, generator=generator) / cols**0.5, codec)


def random_slab(layout: PageLayout, n_slots: int) -> Tensor:
    """uint8 [n_slots, page bytes], a different expert in each slot."""
    slab = torch.zeros(n_slots, layout.bytes, dtype=torch.uint8)
    for slot in range(n_slots):
        for i, matrix in enumerate(("gate", "up", "down")):
            q = random_matrix(layout.codec, *layout.shape(matrix), seed=slot * 3 + i)
            _write(slab[slot], layout, matrix, q)
    return slab


def _write(page: Tensor, layout: PageLayout, matrix: str, q: QTensor) -> None:
    for s in layout.slices:
        if s.matrix == matrix:
            page[s.offset : s.offset + s.spec.nbytes] = (
                q.parts[s.part].contiguous().view(-1).view(torch.uint8)
            )


def random_routing(n: int, k: int, n_experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(chosen int64 [n, k], distinct per token; weights float32 [n, k])."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(n_experts, generator=generator)[:k] for _ in range(n)])
    return chosen, torch.rand(n, k, generator=generator)


def true_rows(
    x: Tensor, layout: PageLayout, slab: Tensor, slots: Tensor, chosen: Tensor, weights: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """What `experts` should return, computed in `dtype` from dequantised pages: float64 [n, k, hidden]."""
    n, k = chosen.shape
    out = torch.zeros(n, k, layout.hidden, dtype=torch.float64)
    for t in range(n):
        for p in range(k):
            slot = int(slots[chosen[t, p]])
            if slot >= 0:
                y = run_expert(layout.expert(slab[slot]), x[t].to(dtype), dtype)
                out[t, p] = y.double() * weights[t, p].double()
    return out


def run_expert(expert: Expert, x: Tensor, dtype: torch.dtype) -> Tensor:
    gate, up, down = (q.dequantize(dtype) for q in (expert.gate, expert.up, expert.down))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what was wanted."""
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm())
