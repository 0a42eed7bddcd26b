"""Routed experts for training: tokens sorted by expert, one matrix product per expert, forward and backward.

Knows matrices only; it must not know how the experts were chosen. Groups are padded to multiples of 64 rows,
so that the matrix library meets few different shapes. Reference: a loop over tokens (tests/mini compares).
"""

from typing import Any

import torch
from torch import Tensor

PAD = 64


def plan_groups(experts: Tensor, n_experts: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Row of each (token, choice) pair in the padded, sorted buffer; and each expert's (start, end) in it.

    experts [n, k] -> (rows int64 [n * k], groups).
    """
    flat = experts.reshape(-1)
    counts = torch.bincount(flat, minlength=n_experts)
    padded = (counts + PAD - 1) // PAD * PAD
    ends, starts = padded.cumsum(0), padded.cumsum(0) - padded
    order = flat.argsort(stable=True)
    within = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[flat[order]]
    rows = torch.empty_like(flat)
    rows[order] = within + starts[flat[order]]
    return rows, list(zip(starts.tolist(), ends.tolist(), strict=True))


class Experts(torch.autograd.Function):
    """sum over the chosen experts of weight * down(silu(gate x) * up x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        """x [n, H], experts and weights [n, k], gate_up [E, 2I, H], down [E, H, I] -> [n, H] in float32."""
        n, hidden = x.shape
        inner = down.shape[2]
        k = experts.shape[1]
        rows, groups = plan_groups(experts, gate_up.shape[0])
        xs = x.new_zeros(groups[-1][1], hidden)
        xs[rows] = x.repeat_interleave(k, 0)
        both = x.new_empty(len(xs), 2 * inner)
        for e, (s, t) in enumerate(groups):
            if t > s:
                torch.mm(xs[s:t], gate_up[e].t(), out=both[s:t])
        act = _gated(both)
        y = x.new_empty(len(xs), hidden)
        for e, (s, t) in enumerate(groups):
            if t > s:
                torch.mm(act[s:t], down[e].t(), out=y[s:t])
        pairs = y[rows].view(n, k, hidden)
        ctx.save_for_backward(xs, both, act, pairs, rows, weights, gate_up, down)
        ctx.groups = groups
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), pairs).squeeze(1).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
        """Gradients of x, weights, gate_up and down."""
        xs, both, act, pairs, rows, weights, gate_up, down = ctx.saved_tensors
        n, k, hidden = pairs.shape
        grad = grads[0].to(xs.dtype)
        d_weights = torch.bmm(pairs, grad.unsqueeze(2)).squeeze(2).float()
        dy = xs.new_zeros(len(xs), hidden)
        dy[rows] = (grad.unsqueeze(1) * weights.to(xs.dtype).unsqueeze(2)).view(n * k, hidden)
        d_act, d_down = torch.empty_like(act), torch.zeros_like(down)
        for e, (s, t) in enumerate(ctx.groups):
            if t > s:
                torch.mm(dy[s:t], down[e], out=d_act[s:t])
                torch.mm(dy[s:t].t(), act[s:t], out=d_down[e])
        d_both = _gated_grad(both, d_act)
        dxs, d_gate_up = torch.empty_like(xs), torch.zeros_like(gate_up)
        for e, (s, t) in enumerate(ctx.groups):
            if t > s:
                torch.mm(d_both[s:t], gate_up[e], out=dxs[s:t])
                torch.mm(d_both[s:t].t(), xs[s:t], out=d_gate_up[e])
        dx = dxs[rows].view(n, k, hidden).sum(1)
        return dx, None, d_weights, d_gate_up, d_down


def _gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def _gated_grad(both: Tensor, grad: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=1)
    s = torch.sigmoid(gate)
    out = torch.empty_like(both)
    inner = gate.shape[1]
    torch.mul(grad, gate * s, out=out[:, inner:])
    torch.mul(grad * up, s * (1 + gate * (1 - s)), out=out[:, :inner])
    return out
