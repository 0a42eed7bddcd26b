"""Network of the embedded model: its shape, its parameters by name, and its forward pass for training.

The maths is localmimo's (rms_norm, rope_table, rotate, route, and attend for the check); what is written
again is only faster for whole batches. It must not know files, tokenizers or optimizers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from localmimo.model.attention import rope_table, rotate
from localmimo.model.transformer import rms_norm, route

from .experts import Experts

Params = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes and constants of a V2-Flash model; the defaults are mimo-mini."""

    vocab: int = 8192
    hidden: int = 256
    n_layers: int = 8
    global_layers: tuple[int, ...] = (0, 5, 7)
    window: int = 128
    heads: int = 4
    head_dim: int = 96
    v_head_dim: int = 64
    global_kv: int = 2
    window_kv: int = 4
    rotary_factor: float = 0.334
    dense_inner: int = 768
    n_experts: int = 32
    expert_inner: int = 128
    top_k: int = 4
    value_scale: float = 0.707
    global_theta: float = 5_000_000.0
    window_theta: float = 10_000.0
    eps: float = 1e-5
    n_mtp: int = 3

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotate."""
        return int(self.head_dim * self.rotary_factor)

    def kv(self, layer: int) -> int:
        """KV heads of a layer."""
        return self.global_kv if layer in self.global_layers else self.window_kv


def init_params(shape: Shape, seed: int = 0) -> Params:
    """Fresh float32 parameters; projections back into the residual stream start at zero."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=rng) * std

    h = shape.hidden
    params: Params = {
        "embed": normal(shape.vocab, h, std=0.3),
        "head": normal(shape.vocab, h, std=0.002),
        "norm": torch.ones(h),
    }
    for n in range(shape.n_layers):
        params |= _init_attention(shape, f"layers.{n}", shape.kv(n), n not in shape.global_layers, normal)
        if n == 0:
            params |= _init_mlp(shape, f"layers.{n}", normal)
            continue
        params[f"layers.{n}.router.weight"] = normal(shape.n_experts, h, std=0.02)
        params[f"layers.{n}.experts.gate_up"] = normal(
            shape.n_experts, 2 * shape.expert_inner, h, std=0.7 * h**-0.5
        )
        params[f"layers.{n}.experts.down"] = torch.zeros(shape.n_experts, h, shape.expert_inner)
    for k in range(shape.n_mtp):
        params |= _init_attention(shape, f"mtp.{k}", shape.window_kv, True, normal)
        params |= _init_mlp(shape, f"mtp.{k}", normal)
        params |= {f"mtp.{k}.{name}": torch.ones(h) for name in ("embed_norm", "hidden_norm", "final_norm")}
        params[f"mtp.{k}.proj"] = torch.cat((torch.eye(h) * 0.3, torch.eye(h)), 1)
    return params


def _init_attention(shape: Shape, name: str, kv: int, sink: bool, normal) -> Params:  # type: ignore[no-untyped-def]
    h, std = shape.hidden, 0.7 * shape.hidden**-0.5
    out = {
        f"{name}.attn_norm": torch.ones(h),
        f"{name}.mlp_norm": torch.ones(h),
        f"{name}.attn.q": normal(shape.heads * shape.head_dim, h, std=std),
        f"{name}.attn.k": normal(kv * shape.head_dim, h, std=std),
        f"{name}.attn.v": normal(kv * shape.v_head_dim, h, std=std),
        f"{name}.attn.o": torch.zeros(h, shape.heads * shape.v_head_dim),
    }
    return out | ({f"{name}.attn.sink": torch.zeros(shape.heads)} if sink else {})


def _init_mlp(shape: Shape, name: str, normal) -> Params:  # type: ignore[no-untyped-def]
    return {
        f"{name}.mlp.gate_up": normal(2 * shape.dense_inner, shape.hidden, std=0.7 * shape.hidden**-0.5),
        f"{name}.mlp.down": torch.zeros(shape.hidden, shape.dense_inner),
    }


def stays_float(name: str) -> bool:
    """Parameters computed in float32: norms, sinks, router."""
    return name.endswith(("norm", "sink")) or ".router." in name


def init_biases(shape: Shape) -> dict[str, Tensor]:
    """Router correction biases, which no gradient moves."""
    return {f"layers.{n}.router.bias": torch.zeros(shape.n_experts) for n in range(1, shape.n_layers)}


@dataclass(frozen=True, slots=True)
class Frame:
    """What all layers share for one batch: rotations, and which tokens attend to which (only within a document)."""

    cos_global: Tensor
    sin_global: Tensor
    cos_window: Tensor
    sin_window: Tensor
    whole: Tensor  # bool [B, 1, T, T]
    blocks: Tensor  # bool [B, 1, T / W, W, 2W]: queries of a block, keys of the block before and of this one


def make_frame(shape: Shape, documents: Tensor) -> Frame:
    """documents [B, T]: the number of the conversation each token belongs to; T a multiple of the window."""
    batch, length = documents.shape
    w = shape.window
    at = torch.arange(length)
    whole = (at[:, None] >= at[None, :])[None] & (documents[:, :, None] == documents[:, None, :])
    before = F.pad(documents, (w, 0), value=-1).unfold(1, 2 * w, w)  # [B, T / W, 2W]
    query, key = torch.arange(w)[:, None], torch.arange(2 * w)[None, :] - w
    near = (query >= key) & (query - key < w)
    blocks = near[None, None] & (documents.view(batch, -1, w, 1) == before[:, :, None, :])
    tables = (
        *rope_table(at, shape.rotary_dim, shape.global_theta),
        *rope_table(at, shape.rotary_dim, shape.window_theta),
    )
    return Frame(*tables, whole[:, None], blocks[:, None])


def _heads(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    batch, length, _ = x.shape
    return F.linear(x, weight).view(batch, length, -1, dim).transpose(1, 2)


def global_attention(
    h: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, frame: Frame, shape: Shape
) -> Tensor:
    """h [B, T, H] in float32 plus full causal attention."""
    x = rms_norm(h, norm, shape.eps).to(q.dtype)
    rep = shape.heads // (k.shape[0] // shape.head_dim)
    queries = rotate(_heads(x, q, shape.head_dim), frame.cos_global, frame.sin_global)
    keys = rotate(_heads(x, k, shape.head_dim), frame.cos_global, frame.sin_global).repeat_interleave(rep, 1)
    values = (_heads(x, v, shape.v_head_dim) * shape.value_scale).repeat_interleave(rep, 1)
    scores = (queries @ keys.transpose(-1, -2)).float() * shape.head_dim**-0.5
    mixed = torch.softmax(scores.masked_fill(~frame.whole, float("-inf")), -1).to(q.dtype) @ values
    return h + F.linear(mixed.transpose(1, 2).flatten(2), o).float()


def _with_previous(x: Tensor, w: int) -> Tensor:
    """x [B, heads, T, d] -> [B, heads, T / W, 2W, d]: each block of W rows behind the one before it."""
    blocks = x.unflatten(2, (-1, w))
    return torch.cat((F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :, :-1], blocks), 3)


def window_attention(
    h: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sink: Tensor,
    frame: Frame,
    shape: Shape,
) -> Tensor:
    """h [B, T, H] in float32 plus windowed attention with a sink; blocks of W queries see 2W keys."""
    x = rms_norm(h, norm, shape.eps).to(q.dtype)
    w = shape.window
    rep = shape.heads // (k.shape[0] // shape.head_dim)
    queries = rotate(_heads(x, q, shape.head_dim), frame.cos_window, frame.sin_window).unflatten(2, (-1, w))
    keys = _with_previous(
        rotate(_heads(x, k, shape.head_dim), frame.cos_window, frame.sin_window), w
    ).repeat_interleave(rep, 1)
    values = _with_previous(_heads(x, v, shape.v_head_dim) * shape.value_scale, w).repeat_interleave(rep, 1)
    scores = (queries @ keys.transpose(-1, -2)).float() * shape.head_dim**-0.5
    scores = scores.masked_fill(~frame.blocks, float("-inf"))
    extra = sink.float().view(1, -1, 1, 1, 1)
    top = torch.maximum(scores.amax(-1, keepdim=True), extra).detach()
    weights = torch.exp(scores - top)
    weights = weights / (weights.sum(-1, keepdim=True) + torch.exp(extra - top))
    mixed = (weights.to(q.dtype) @ values).flatten(2, 3)
    return h + F.linear(mixed.transpose(1, 2).flatten(2), o).float()


def dense_mlp(h: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    """h plus the dense MLP."""
    gate, up = F.linear(rms_norm(h, norm, eps).to(down.dtype), gate_up).chunk(2, -1)
    return h + F.linear(F.silu(gate) * up, down).float()


def choose(
    h: Tensor, norm: Tensor, router: Tensor, bias: Tensor, eps: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed rows [n, H] in float32, their experts and their weights."""
    x = rms_norm(h, norm, eps).flatten(0, -2)
    experts, weights = route(x, router, bias, top_k)
    return x, experts, weights


class Network:
    """The forward pass over named parameters; `compiled` fuses the pieces between the experts."""

    def __init__(self, shape: Shape, compiled: bool = False) -> None:
        def fused(f):  # type: ignore[no-untyped-def]
            return torch.compile(f, dynamic=False) if compiled else f

        self.shape = shape
        self._global, self._window = fused(global_attention), fused(window_attention)
        self._dense, self._choose = fused(dense_mlp), fused(choose)

    def hidden(
        self, p: Params, biases: Params, tokens: Tensor, frame: Frame
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens [B, T] -> (hidden states before the final norm [B, T, H], picks per expert and layer)."""
        shape, h, picks = self.shape, p["embed"][tokens].float(), {}
        for n in range(shape.n_layers):
            name = f"layers.{n}"
            h = self._attention(p, name, h, frame, n in shape.global_layers)
            if n == 0:
                h = self._dense(
                    h, p[f"{name}.mlp_norm"], p[f"{name}.mlp.gate_up"], p[f"{name}.mlp.down"], shape.eps
                )
                continue
            bias = biases[f"{name}.router.bias"]
            x, experts, weights = self._choose(
                h, p[f"{name}.mlp_norm"], p[f"{name}.router.weight"], bias, shape.eps, shape.top_k
            )
            out = Experts.apply(
                x.to(p["embed"].dtype),
                experts,
                weights,
                p[f"{name}.experts.gate_up"],
                p[f"{name}.experts.down"],
            )
            h = h + out.view_as(h)
            picks[f"{name}.router.bias"] = torch.bincount(experts.flatten(), minlength=shape.n_experts)
        return h, picks

    def _attention(self, p: Params, name: str, h: Tensor, frame: Frame, full: bool) -> Tensor:
        weights = [p[f"{name}.attn_norm"], *(p[f"{name}.attn.{x}"] for x in "qkvo")]
        if full:
            return self._global(h, *weights, frame, self.shape)
        return self._window(h, *weights, p[f"{name}.attn.sink"], frame, self.shape)

    def draft(self, p: Params, k: int, hidden: Tensor, following: Tensor, frame: Frame) -> Tensor:
        """MTP block k: main hidden states and the tokens k + 1 places on -> its normed output."""
        name, eps = f"mtp.{k}", self.shape.eps
        e = rms_norm(p["embed"][following].float(), p[f"{name}.embed_norm"], eps)
        g = rms_norm(hidden, p[f"{name}.hidden_norm"], eps)
        h = F.linear(torch.cat((e, g), -1).to(p[f"{name}.proj"].dtype), p[f"{name}.proj"]).float()
        h = self._attention(p, name, h, frame, False)
        h = self._dense(h, p[f"{name}.mlp_norm"], p[f"{name}.mlp.gate_up"], p[f"{name}.mlp.down"], eps)
        return rms_norm(h, p[f"{name}.final_norm"], eps)

    def logits(self, p: Params, hidden: Tensor) -> Tensor:
        """Last hidden states -> logits in float32."""
        return F.linear(rms_norm(hidden, p["norm"], self.shape.eps).to(p["head"].dtype), p["head"]).float()


class WeightedLoss(torch.autograd.Function):
    """sum(w * cross-entropy) / sum(w) over rows; the gradient is made on the way, in blocks of rows."""

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """x [n, H] normed, head [V, H], targets [n], weights [n]."""
        total = weights.sum().clamp_min(1e-6)
        dx, d_head, loss = torch.empty_like(x), torch.zeros_like(head), torch.zeros(())
        for s in range(0, len(x), 1024):
            part = x[s : s + 1024]
            logits = (part @ head.t()).float()
            top = torch.logsumexp(logits, 1, keepdim=True)
            target, w = targets[s : s + 1024, None], weights[s : s + 1024, None] / total
            loss += ((top - logits.gather(1, target)) * w).sum()
            slope = logits.sub_(top).exp_().mul_(w).scatter_add_(1, target, -w).to(x.dtype)
            torch.mm(slope, head, out=dx[s : s + 1024])
            d_head.addmm_(slope.t(), part)
        ctx.save_for_backward(dx, d_head)
        return loss

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        """The stored gradients, scaled."""
        dx, d_head = ctx.saved_tensors
        return dx * grads[0].to(dx.dtype), d_head * grads[0].to(dx.dtype), None, None
