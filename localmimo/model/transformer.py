"""The maths of MiMo-V2: embedding, blocks of attention and MLP, router, output head.

Holds the dense weights and no sequence: the KV cache and the runner of the routed experts come as arguments.
Knows nothing of files, budgets, tokenizers or where an expert's bytes are. The residual stream is float32;
projections run in the dtype their input is cast to. Sources: arXiv 2601.02780 and transformers 5.23
(`mimo_v2_flash`), against which tests/model compares it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from localmimo.limits import PREFILL_CHUNK
from localmimo.model.attention import Rope, extend, rope_table
from localmimo.model.config import LayerSpec, ModelConfig
from localmimo.model.protocols import Cache, Experts, PredictNext, nothing_to_check, nothing_to_report
from localmimo.model.weights import BlockWeights, MlpWeights, RouterWeights, Weights
from quant import linear
from quant.kernels import attention as native
from quant.kernels.block import Choice, FusedBlock, HeadShape, Router, Span
from quant.kernels.block import serves as fusible

# ---- pure maths (differentiable: examples/train_mini.py trains with it) ----


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in float32 -> x's dtype."""
    if native.serves(x, weight) and x.is_contiguous():
        return native.rms_norm(x, weight, eps)
    wide = x.float()
    if x.is_cuda:  # one kernel in place of six
        return F.rms_norm(wide, weight.shape, weight.float(), eps).to(x.dtype)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, scale: float = 1.0, normalise: bool = True
) -> tuple[Tensor, Tensor]:
    """Choose experts for x [n, hidden]: (experts int64 [n, k] in ascending order, their weights float32 [n, k]).

    Sigmoid scores in float32 from weight [E, hidden]; `bias` [E] takes part in the choice alone.
    """
    if native.serves(x, weight, bias):
        return native.route(x.contiguous(), weight, bias, top_k, scale, normalise)
    return route_reference(x, weight, bias, top_k, scale, normalise)


def route_reference(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, scale: float, normalise: bool
) -> tuple[Tensor, Tensor]:
    """`route` in torch."""
    scores = torch.sigmoid(F.linear(x.float(), weight.float()))
    chosen = (scores + bias.float()).topk(top_k, dim=-1).indices.sort(dim=-1).values
    picked = scores.gather(-1, chosen)
    return chosen, (picked / (picked.sum(-1, keepdim=True) + 1e-20) if normalise else picked) * scale


# ---- the model ----


HEAD_ROWS = 64  # whose logits a GPU computes at a time: those of a whole prompt would take gigabytes
ROPE_TABLE = 1024  # positions whose rotations are computed together: those of one token cost as much
MAX_PREDICTED_TOKENS = 8  # beyond this nothing is predicted: so many tokens use most of the experts anyway


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Rows of one sequence that go through a layer's attention together."""

    cache: Cache
    first: int  # row in the batch
    n: int
    position: int | None  # of the first row; None where only the device knows it
    positions: Tensor | None  # of all rows, int64 [n], where a GPU is to read them
    ropes: dict[tuple[int, float], Rope]  # by LayerSpec.rope


def pieces_of(
    sequences: Sequence[tuple[int, Cache]], ropes: set[tuple[int, float]], device: torch.device | None = None
) -> list[list[PromptChunk]]:
    """Cut sequences of n tokens into pieces of at most PREFILL_CHUNK; groups of pieces of at most as many rows."""
    groups: list[list[PromptChunk]] = []
    first = n_left = 0
    for n_tokens, cache in sequences:
        for at in range(0, n_tokens, PREFILL_CHUNK):
            n = min(PREFILL_CHUNK, n_tokens - at)
            if n > n_left:
                groups.append([])
                n_left = PREFILL_CHUNK
            position = cache.length + at
            tables = {rope: rope_rows(position, n, *rope, device) for rope in ropes}
            on_gpu = device is not None and device.type == "cuda"
            positions = torch.arange(position, position + n, device=device) if on_gpu else None
            groups[-1].append(PromptChunk(cache, first, n, position, positions, tables))
            first, n_left = first + n, n_left - n
    return groups


def rope_rows(
    position: int, n: int, rotary_dim: int, theta: float, device: torch.device | None = None
) -> Rope:
    """`rope_table` of n positions from `position` on: rows of a cached table where one table has them all."""
    table, first = divmod(position, ROPE_TABLE)
    if first + n > ROPE_TABLE:
        return rope_table(torch.arange(position, position + n, device=device), rotary_dim, theta)
    cos, sin = _cached_table(table, rotary_dim, theta, device)
    return cos[first : first + n], sin[first : first + n]


@lru_cache(maxsize=16)
def _cached_table(table: int, rotary_dim: int, theta: float, device: torch.device | None) -> Rope:
    positions = torch.arange(table * ROPE_TABLE, (table + 1) * ROPE_TABLE, device=device)
    return rope_table(positions, rotary_dim, theta)


class Transformer:
    """The main model: tokens in, hidden states and logits out."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: torch.dtype) -> None:
        self.config = config
        self.weights = weights
        self.dtype = dtype
        self.device = weights.norm.device
        moe = config.moe_layers
        self._next_moe = dict(pairwise(moe))
        self._fused = [self._fuse(*both) for both in zip(config.layers, weights.blocks, strict=True)]

    def _fuse(self, spec: LayerSpec, block: BlockWeights) -> FusedBlock | None:
        """The layer up to its experts as one native call, where its weights allow it."""
        mlp = block.mlp if isinstance(block.mlp, MlpWeights) else None
        matrices = (mlp.gate, mlp.up, mlp.down) if mlp is not None else ()
        if self.dtype != torch.float32 or not fusible(block.attention.qkv, block.attention.o, *matrices):
            return None
        heads = HeadShape(spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.v_head_dim, spec.window)
        rest = self._router(block.mlp) if isinstance(block.mlp, RouterWeights) else matrices
        return FusedBlock(
            heads, block.attention.qkv, block.attention.o, block.attn_norm, block.mlp_norm, block.attention.sink,
            rest, eps=self.config.eps, value_scale=self.config.value_scale,
        )  # fmt: skip

    def _router(self, router: RouterWeights) -> Router:
        config = self.config
        return Router(
            router.weight,
            router.bias,
            config.top_k,
            config.routed_scale,
            config.norm_topk,
            config.router_bf16,
        )

    def forward(
        self,
        tokens: Tensor,
        cache: Cache,
        experts: Experts,
        check: Callable[[], None] = nothing_to_check,
        report: Callable[[float], None] = nothing_to_report,
    ) -> Tensor:
        """Run tokens [n] behind what the cache holds; returns the last layer's hidden states, before the final norm.

        `check` is called between layers, and between the pieces of a long segment within a layer; it may raise to
        stop: the cache is then as long as before. `report` gets the share of the layers that is done.
        """
        return self.forward_many([(tokens, cache)], experts, check, report)[0]

    def forward_many(
        self,
        sequences: Sequence[tuple[Tensor, Cache]],
        experts: Experts,
        check: Callable[[], None] = nothing_to_check,
        report: Callable[[float], None] = nothing_to_report,
    ) -> list[Tensor]:
        """`forward` of several sequences at once, each with a cache of its own: they share projections and experts."""
        x = self.embed(torch.cat([tokens for tokens, _ in sequences]))
        return self.through(x, [(len(tokens), cache) for tokens, cache in sequences], experts, check, report)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings float32 [n, hidden] of tokens [n] in main memory."""
        return F.embedding(tokens, self.weights.embed).to(self.device).float()

    @torch.inference_mode()
    def through(
        self,
        x: Tensor,
        sequences: Sequence[tuple[int, Cache]],
        experts: Experts,
        check: Callable[[], None] = nothing_to_check,
        report: Callable[[float], None] = nothing_to_report,
    ) -> list[Tensor]:
        """Take rows x [n, hidden] of sequences through the layers, so many rows of each; x is overwritten."""
        for n, cache in sequences:
            cache.reserve(n)
        groups = pieces_of(sequences, {spec.rope for spec in self.config.layers}, self.device)
        for layer in range(len(self.config.layers)):
            self._layer(layer, x, groups, experts, check)
            report((layer + 1) / len(self.config.layers))
        for n, cache in sequences:
            cache.advance(n)
        return list(x.split([n for n, _ in sequences]))

    def _layer(
        self,
        layer: int,
        x: Tensor,
        groups: list[list[PromptChunk]],
        experts: Experts,
        check: Callable[[], None],
    ) -> None:
        """One layer, added to x [n, hidden]: attention piece by piece, the experts once for all rows."""
        routed = []
        for group in groups:
            check()
            rows = x if len(groups) == 1 else x[group[0].first : group[-1].first + group[-1].n]
            choice = self.attend_and_choose(layer, rows, group)
            if choice is not None:
                routed.append(choice)
        if routed:
            check()
            normed, chosen, weights = (
                routed[0] if len(routed) == 1 else map(torch.cat, zip(*routed, strict=True))
            )
            x += experts.run(layer, normed, chosen, weights, self.predict_next(layer, x))

    def attend_and_choose(self, layer: int, x: Tensor, group: list[PromptChunk]) -> Choice | None:
        """Attention added to x, then a dense MLP too; or what a MoE layer's experts are to do."""
        spec, block, fused = self.config.layers[layer], self.weights.blocks[layer], self._fused[layer]
        if fused is not None:
            return self._fused_run(fused, layer, spec, x, group)
        x += self._attention(layer, block, x, group)
        normed = self._norm(x, block.mlp_norm)
        if isinstance(block.mlp, MlpWeights):
            x += silu_mlp(normed, block.mlp)
            return None
        return normed, *self.route(block.mlp, normed)

    def _fused_run(
        self, fused: FusedBlock, layer: int, spec: LayerSpec, x: Tensor, group: list[PromptChunk]
    ) -> Choice | None:
        all_rows = [piece.cache.layers[layer].next_rows(piece.n) for piece in group]
        spans = [
            Span(piece.n, piece.position, *piece.ropes[spec.rope], rows.keys, rows.values, rows.first)
            for piece, rows in zip(group, all_rows, strict=True)
        ]
        choice = fused.run(x, spans)
        for piece, rows in zip(group, all_rows, strict=True):
            piece.cache.layers[layer].commit(rows, piece.n)
        return choice

    def predict_next(self, layer: int, x: Tensor) -> PredictNext | None:
        """Runs the next MoE layer's router on x as it is before this layer's experts are added, for prefetching."""
        following = self._next_moe.get(layer)
        if following is None or x.shape[0] > MAX_PREDICTED_TOKENS:
            return None
        block = self.weights.blocks[following]
        assert isinstance(block.mlp, RouterWeights)
        router = block.mlp
        return lambda: (following, self.route(router, self._norm(x, block.mlp_norm))[0])

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [n, vocab], in main memory, of hidden states [n, hidden] taken before the final norm."""
        if hidden.is_cuda and len(hidden) > HEAD_ROWS:
            return torch.cat([self.logits(rows) for rows in hidden.split(HEAD_ROWS)])
        return linear(self._norm(hidden, self.weights.norm), self.weights.head).float().cpu()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.config.eps).to(self.dtype)

    def _attention(self, layer: int, block: BlockWeights, x: Tensor, group: list[PromptChunk]) -> Tensor:
        spec = self.config.layers[layer]
        joined = linear(self._norm(x, block.attn_norm), block.attention.qkv)
        parts = (joined if joined.is_cuda else joined.float()).split([piece.n for piece in group])
        mixed = [self._attend(layer, spec, block, *both) for both in zip(parts, group, strict=True)]
        return linear(torch.cat(mixed).to(self.dtype), block.attention.o)

    def _attend(
        self, layer: int, spec: LayerSpec, block: BlockWeights, joined: Tensor, piece: PromptChunk
    ) -> Tensor:
        kv, rope = piece.cache.layers[layer], piece.ropes[spec.rope]
        rows, sink = kv.next_rows(piece.n), block.attention.sink
        scale = self.config.value_scale
        mixed = extend(joined, rope, rows, piece.position, spec, sink, scale, piece.positions)
        kv.commit(rows, piece.n)
        return mixed

    def route(self, router: RouterWeights, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token of normed [n, hidden], and their weights (`route`)."""
        config = self.config
        # V2.6 multiplies bf16 by bf16; products of bf16 are exact in float32, so rounding the input is enough.
        x = (normed.bfloat16() if config.router_bf16 else normed).float()
        return route(x, router.weight, router.bias, config.top_k, config.routed_scale, config.norm_topk)


def silu_mlp(x: Tensor, mlp: MlpWeights) -> Tensor:
    """down(silu(gate x) * up x) of x [n, hidden], from packed weights, in x's dtype."""
    return linear(F.silu(linear(x, mlp.gate)) * linear(x, mlp.up), mlp.down)
