"""Every tensor that a published MiMo-V2 checkpoint stores, from its config.json alone: name, dtype, shape.

The inverse of `names`: from it the size of a pack is computed before anything is downloaded. It must not read files,
nor import torch. The layouts are those of the published checkpoints (see `names`); V2.5's towers are listed so that the
totals can be compared with the published ones; only their sizes are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

from quant.checkpoint.geometry import MAX_LAYERS, AttentionHeads, Geometry
from quant.errors import BadCheckpoint
from quant.formats.codec import ceil_div

N_MTP = 3  # draft blocks that every release ships; only V2.6's config says so
MXFP4_BLOCK = 32
ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}

VISION = """hidden_size intermediate_size patch_size spatial_merge_size in_chans temporal_patch_size depth
out_hidden_size num_heads num_key_value_heads qk_channels"""
AUDIO = """input_local_dim input_local_intermediate_size audio_channels speech_vocab_size input_local_layers group_size
out_hidden_size"""
REPEATED = ("depth", "audio_channels", "input_local_layers")


class PublishedTensor(NamedTuple):
    """A stored tensor, as a safetensors header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.n_elements * ITEM_BYTES[self.dtype]


Tensors = Iterator[PublishedTensor]


def published_tensors(config: Mapping[str, Any]) -> Tensors:
    """All tensors of a checkpoint with this config.json, in model order. Raises BadCheckpoint on a bad config."""
    listing = _Text(config)
    yield from listing.tensors()
    if isinstance(config.get("vision_config"), dict):
        yield from _vision(_sizes(config, "vision_config", VISION))
    if isinstance(config.get("audio_config"), dict):
        yield from _audio(_sizes(config, "audio_config", AUDIO))


class _Text:
    """The text model's tensors."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.g = Geometry.parse(config)
        quantization = config.get("quantization_config") or {}
        self.fp8 = quantization.get("quant_method") == "fp8"
        self.mxfp4 = quantization.get("store_dtype") == "mxfp4"
        self.router = "BF16" if config.get("moe_router_dtype") == "bfloat16" else "F32"
        self.sinks = {
            True: bool(config.get("add_swa_attention_sink_bias")),
            False: bool(config.get("add_full_attention_sink_bias")),
        }

    def tensors(self) -> Tensors:
        g = self.g
        yield PublishedTensor("model.embed_tokens.weight", "BF16", (g.vocab, g.hidden))
        for layer in range(g.n_layers):
            yield from self._layer(f"model.layers.{layer}", layer)
        yield PublishedTensor("model.norm.weight", "BF16", (g.hidden,))
        yield PublishedTensor("lm_head.weight", "BF16", (g.vocab, g.hidden))
        for k in range(N_MTP if g.n_mtp is None else g.n_mtp):
            yield from self._mtp_block(f"model.mtp.layers.{k}")

    def _layer(self, prefix: str, layer: int) -> Tensors:
        g = self.g
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield PublishedTensor(f"{prefix}.{norm}.weight", "BF16", (g.hidden,))
        yield from self._attention(f"{prefix}.self_attn", g.heads(layer), window=g.window[layer])
        if not g.moe[layer]:
            yield from self._mlp(f"{prefix}.mlp", g.inner_dense)
            return
        yield PublishedTensor(f"{prefix}.mlp.gate.weight", self.router, (g.n_experts, g.hidden))
        yield PublishedTensor(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (g.n_experts,))
        for expert in range(g.n_experts):
            yield from self._mlp(f"{prefix}.mlp.experts.{expert}", g.inner_expert, routed=True)

    def _mtp_block(self, prefix: str) -> Tensors:
        g = self.g
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            yield PublishedTensor(f"{prefix}.{norm}.weight", "BF16", (g.hidden,))
        yield PublishedTensor(f"{prefix}.eh_proj.weight", "BF16", (g.hidden, 2 * g.hidden))
        yield from self._attention(f"{prefix}.self_attn", g.window_heads, window=True)
        yield from self._mlp(f"{prefix}.mlp", g.inner_dense)

    def _attention(self, prefix: str, heads: AttentionHeads, *, window: bool) -> Tensors:
        hidden, side = self.g.hidden, self.g.scale_block[0]
        if self.g.fused:
            n_scale_rows = heads.shards * ceil_div(heads.rows // heads.shards, side)
            yield from self._matrix(f"{prefix}.qkv_proj", heads.rows, hidden, n_scale_rows)
        else:
            k_scale_rows, v_scale_rows = _joint_scale_rows(heads, side)
            yield from self._matrix(f"{prefix}.q_proj", heads.q_rows, hidden)
            yield from self._matrix(f"{prefix}.k_proj", heads.k_rows, hidden, k_scale_rows)
            yield from self._matrix(f"{prefix}.v_proj", heads.v_rows, hidden, v_scale_rows)
        yield PublishedTensor(f"{prefix}.o_proj.weight", "BF16", (hidden, heads.q * heads.v_dim))
        if self.sinks[window]:
            yield PublishedTensor(f"{prefix}.attention_sink_bias", "BF16", (heads.q,))

    def _mlp(self, prefix: str, inner: int, *, routed: bool = False) -> Tensors:
        hidden = self.g.hidden
        for name, rows, cols in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            full = f"{prefix}.{name}_proj"
            if routed and self.mxfp4:
                yield PublishedTensor(f"{full}.weight", "U8", (rows, cols // 2))
                yield PublishedTensor(f"{full}.weight_scale", "U8", (rows, cols // MXFP4_BLOCK))
            else:
                yield from self._matrix(full, rows, cols)

    def _matrix(self, name: str, rows: int, cols: int, n_scale_rows: int | None = None) -> Tensors:
        """A matrix with its block scales, or in bf16 where the checkpoint is not quantised."""
        yield PublishedTensor(f"{name}.weight", "F8_E4M3" if self.fp8 else "BF16", (rows, cols))
        if self.fp8:
            side, across = self.g.scale_block
            grid = (n_scale_rows or ceil_div(rows, side), ceil_div(cols, across))
            yield PublishedTensor(f"{name}.weight_scale_inv", "F32", grid)


def _joint_scale_rows(heads: AttentionHeads, side: int) -> tuple[int, int]:
    """Scale rows of K and of V, quantised as one matrix [K | V] per shard (V2-Flash; see `names`)."""
    if heads.kv % heads.shards:
        return ceil_div(heads.k_rows, side), ceil_div(heads.v_rows, side)
    k_blocks = ceil_div(heads.k_rows // heads.shards, side)
    blocks = ceil_div((heads.k_rows + heads.v_rows) // heads.shards, side)
    return heads.shards * k_blocks, heads.shards * (blocks - k_blocks)


def _sizes(config: Mapping[str, Any], tower: str, keys: str) -> dict[str, Any]:
    """The numbers of one tower, each held against what a model can have."""
    found = {**config[tower]}
    for key in keys.split():
        value, most = found.get(key), MAX_LAYERS if key in REPEATED else (1 << 31) - 1
        if isinstance(value, str) and value.isdecimal() and len(value) < 10:
            value = found[key] = int(value)
        if type(value) is not int or not 0 < value <= most:
            raise BadCheckpoint(
                f"config.json: {tower}.{key} is {str(value)[:40]}; a whole number from 1 to {most:,} was expected."
            )
    if not isinstance(found.setdefault("fullatt_block_indexes", []), list):
        raise BadCheckpoint(f"config.json: {tower}.fullatt_block_indexes is no list.")
    return found


# V2.5's vision and audio towers. Their sizes reproduce the published totals: 459 tensors, 989,721,600 elements.


def _vision(config: Mapping[str, Any]) -> Tensors:
    hidden, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    merged = hidden * config["spatial_merge_size"] ** 2
    patches = (config["in_chans"], config["temporal_patch_size"], patch, patch)
    yield PublishedTensor("visual.patch_embed.proj.weight", "BF16", (hidden, *patches))
    for block in range(config["depth"]):
        yield from _vision_block(f"visual.blocks.{block}", block, config, hidden, inner)
    yield PublishedTensor("visual.merger.ln_q.weight", "BF16", (hidden,))
    yield PublishedTensor("visual.merger.mlp.0.weight", "BF16", (merged, merged))
    yield PublishedTensor("visual.merger.mlp.2.weight", "BF16", (config["out_hidden_size"], merged))


def _vision_block(prefix: str, block: int, config: Mapping[str, Any], hidden: int, inner: int) -> Tensors:
    heads, kv, dim = config["num_heads"], config["num_key_value_heads"], config["qk_channels"]
    for norm in ("norm1", "norm2"):
        yield PublishedTensor(f"{prefix}.{norm}.weight", "BF16", (hidden,))
    for name, rows, cols in (
        ("attn.qkv", (heads + 2 * kv) * dim, hidden),
        ("attn.proj", hidden, heads * dim),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    ):
        yield PublishedTensor(f"{prefix}.{name}.weight", "BF16", (rows, cols))
        yield PublishedTensor(f"{prefix}.{name}.bias", "BF16", (rows,))
    if block not in config["fullatt_block_indexes"]:
        yield PublishedTensor(f"{prefix}.attn.sinks", "BF16", (heads,))


def _audio(config: Mapping[str, Any]) -> Tensors:
    dim, inner = config["input_local_dim"], config["input_local_intermediate_size"]
    for channel in range(config["audio_channels"]):
        yield PublishedTensor(
            f"speech_embeddings.{channel}.weight", "BF16", (config["speech_vocab_size"], dim)
        )
    root = "audio_encoder.input_local_transformer"
    for layer in range(config["input_local_layers"]):
        yield from _audio_layer(f"{root}.layers.{layer}", dim, inner)
    yield PublishedTensor(f"{root}.norm.weight", "BF16", (dim,))
    joined = dim * config["group_size"]
    yield PublishedTensor("audio_encoder.projection.mlp.0.weight", "BF16", (4 * joined, joined))
    yield PublishedTensor(
        "audio_encoder.projection.mlp.2.weight", "BF16", (config["out_hidden_size"], 4 * joined)
    )


def _audio_layer(prefix: str, dim: int, inner: int) -> Tensors:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield PublishedTensor(f"{prefix}.{norm}.weight", "BF16", (dim,))
    for name in ("q_proj", "k_proj", "v_proj"):
        yield PublishedTensor(f"{prefix}.self_attn.{name}.weight", "BF16", (dim, dim))
        yield PublishedTensor(f"{prefix}.self_attn.{name}.bias", "BF16", (dim,))
    yield PublishedTensor(f"{prefix}.self_attn.o_proj.weight", "BF16", (dim, dim))
    for name, rows, cols in (("gate", inner, dim), ("up", inner, dim), ("down", dim, inner)):
        yield PublishedTensor(f"{prefix}.mlp.{name}_proj.weight", "BF16", (rows, cols))
