"""The dimensions of a MiMo-V2 checkpoint, from its config.json: what the shapes of its tensors follow from.

It must not know how the model computes: keys that only change the maths are copied to the pack, not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quant.errors import BadCheckpoint

ARCHITECTURES = ("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM")
MODEL_TYPES = ("mimo_v2_flash", "mimo_v2")
MAX_LAYERS = 1 << 10  # the largest has 70
MAX_EXPERTS = 1 << 12  # the largest has 384
MAX_PAGES = 1 << 18  # experts of all layers; the largest has 26,496


@dataclass(frozen=True)
class AttentionHeads:
    """The attention of one kind of layer. `shards`: how many [Q | K | V] groups a fused tensor holds."""

    q: int
    kv: int
    qk_dim: int
    v_dim: int
    shards: int

    @property
    def q_rows(self) -> int:
        return self.q * self.qk_dim

    @property
    def k_rows(self) -> int:
        return self.kv * self.qk_dim

    @property
    def v_rows(self) -> int:
        return self.kv * self.v_dim

    @property
    def rows(self) -> int:
        return self.q_rows + self.k_rows + self.v_rows


@dataclass(frozen=True)
class Geometry:
    """Dimensions of the text model."""

    hidden: int
    vocab: int
    inner_dense: int
    inner_expert: int
    n_experts: int
    window: tuple[bool, ...]  # per layer
    moe: tuple[bool, ...]  # per layer
    global_heads: AttentionHeads
    window_heads: AttentionHeads
    fused: bool
    scale_block: tuple[int, int]
    n_mtp: int | None  # None: config.json does not say

    @property
    def n_layers(self) -> int:
        return len(self.window)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, moe in enumerate(self.moe) if moe)

    def heads(self, layer: int) -> AttentionHeads:
        return self.window_heads if self.window[layer] else self.global_heads

    @classmethod
    def parse(cls, config: object) -> Geometry:
        """Read config.json strictly; raises BadCheckpoint naming the key."""
        if not isinstance(config, dict):
            raise BadCheckpoint("config.json is not a JSON object.")
        _check_family(config)
        n_layers = _count(config, "num_hidden_layers", most=MAX_LAYERS)
        n_mtp = config.get("num_nextn_predict_layers")
        moe = _flags(config, "moe_layer_freq", n_layers)
        _check_pages(config, sum(moe))
        return cls(
            hidden=_count(config, "hidden_size"),
            vocab=_count(config, "vocab_size"),
            inner_dense=_count(config, "intermediate_size"),
            inner_expert=_count(config, "moe_intermediate_size") if any(moe) else 0,
            n_experts=_count(config, "n_routed_experts", most=MAX_EXPERTS) if any(moe) else 0,
            window=_flags(config, "hybrid_layer_pattern", n_layers),
            moe=moe,
            global_heads=_heads(config, ""),
            window_heads=_heads(config, "swa_"),
            fused=_fused(config),
            scale_block=_scale_block(config),
            n_mtp=None
            if n_mtp is None
            else _count(config, "num_nextn_predict_layers", least=0, most=MAX_LAYERS),
        )


def _check_pages(config: Mapping[str, object], n_moe: int) -> None:
    pages = n_moe * _count(config, "n_routed_experts", most=MAX_EXPERTS) if n_moe else 0
    if pages > MAX_PAGES:
        raise BadCheckpoint(
            f"config.json describes {pages:,} experts in all; at most {MAX_PAGES:,} are read."
        )


def _check_family(config: Mapping[str, object]) -> None:
    """By model_type; the released V2-Flash class may leave it empty, then by the architecture's name."""
    architectures = config.get("architectures") or []
    family = config.get("model_type") or architectures
    named = isinstance(architectures, list) and any(a in ARCHITECTURES for a in architectures)
    if family not in MODEL_TYPES and not (family == architectures and named):
        raise BadCheckpoint(
            f"config.json describes {family!r}, not a MiMo-V2 model ({' or '.join(MODEL_TYPES)})."
        )


def _count(config: Mapping[str, object], key: str, *, least: int = 1, most: int = (1 << 31) - 1) -> int:
    value = config.get(key)
    if type(value) is not int or not least <= value <= most:
        raise BadCheckpoint(
            f"config.json: {key} is {value!r}; a whole number from {least} to {most:,} was expected."
        )
    return value


def _flags(config: Mapping[str, object], key: str, n_layers: int) -> tuple[bool, ...]:
    """A 0/1 list with one entry per layer; a missing key means 0 everywhere, as in the reference config
    class."""
    value = config.get(key)
    if value is None:
        return (False,) * n_layers
    if not isinstance(value, list) or any(v not in (0, 1) for v in value):
        raise BadCheckpoint(f"config.json: {key} must be a list of 0 and 1.")
    if len(value) != n_layers:
        raise BadCheckpoint(f"config.json: {key} has {len(value)} entries for {n_layers} layers.")
    return tuple(bool(v) for v in value)


def _heads(config: Mapping[str, object], prefix: str) -> AttentionHeads:
    """Head counts of one layer kind; a missing swa_ key means the same as in global layers."""

    def count(key: str) -> int:
        return _count(config, prefix + key if prefix + key in config else key)

    heads = AttentionHeads(
        q=count("num_attention_heads"),
        kv=count("num_key_value_heads"),
        qk_dim=count("head_dim"),
        v_dim=count("v_head_dim"),
        shards=_count(config, "num_key_value_heads"),
    )
    if heads.q % heads.kv:
        raise BadCheckpoint(f"config.json: {heads.q} query heads do not divide by {heads.kv} KV heads.")
    if _fused(config) and heads.kv % heads.shards:
        raise BadCheckpoint(
            f"config.json: {heads.kv} KV heads do not divide into {heads.shards} fused shards."
        )
    return heads


def _fused(config: Mapping[str, object]) -> bool:
    layout = config.get("attention_projection_layout")
    if layout not in (None, "split", "fused_qkv"):
        raise BadCheckpoint(
            f"config.json: attention_projection_layout is {layout!r}, not split or fused_qkv."
        )
    return layout == "fused_qkv"


def _scale_block(config: Mapping[str, object]) -> tuple[int, int]:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict | None):
        raise BadCheckpoint(f"config.json: quantization_config is {str(quantization)[:100]}, not an object.")
    _check_method(quantization)
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    match block:
        case None:
            return (128, 128)
        case [int(rows), int(cols)] if 0 < rows < 1 << 31 and 0 < cols < 1 << 31:
            return (rows, cols)
    raise BadCheckpoint(f"config.json: weight_block_size is {block!r}; two positive numbers were expected.")


def _check_method(quantization: object) -> None:
    """Only what the published checkpoints use is read; what others made of them is refused with the reason."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "bitsandbytes":
        raise BadCheckpoint(
            "This checkpoint was saved by bitsandbytes: one float32 scale for 64 weights of a flattened matrix. A pack "
            "keeps an FP8 scale for 16 or 32 weights of a row, so every value would be rounded a second time. Convert "
            "the published checkpoint instead."
        )
    if method not in (None, "fp8"):
        raise BadCheckpoint(
            f"config.json: quant_method is {method!r}; only fp8 checkpoints (with mxfp4 experts or without) and "
            "plain ones are read. Convert the published checkpoint instead."
        )
