"""The same model in transformers (`mimo_v2_flash`, eager, float32), built from canonical weights."""

import json
from pathlib import Path

import torch
from transformers.models.mimo_v2_flash import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from localmimo.model.config import LayerSpec, ModelConfig
from tests.tiny import oracle_weights

Weights = dict[str, torch.Tensor]


def load_oracle(folder: Path) -> MiMoV2FlashForCausalLM:
    """A checkpoint's weights, rounded to bf16 as a bf16 pack holds them, in transformers' own class."""
    raw = json.loads((folder / "config.json").read_text())
    config = ModelConfig.parse(raw)
    weights = {
        name: weight if "router" in name else weight.bfloat16().float()
        for name, weight in oracle_weights(folder).items()
    }
    model = MiMoV2FlashForCausalLM._from_config(
        _config(config), attn_implementation="eager", dtype=torch.float32
    )
    missing, unexpected = model.load_state_dict(_state(config, weights), strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing), (missing, unexpected)
    return model.eval()


def _config(config: ModelConfig) -> MiMoV2FlashConfig:
    by_kind = {spec.attention: spec for spec in (*config.layers, config.mtp_layer)}
    wide = by_kind.get("global", config.mtp_layer)
    factor = (wide.rotary_dim + 0.25) / wide.head_dim
    return MiMoV2FlashConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden,
        intermediate_size=config.dense_inner,
        moe_intermediate_size=config.expert_inner,
        num_hidden_layers=len(config.layers),
        num_attention_heads=wide.n_heads,
        num_key_value_heads=wide.n_kv_heads,  # in window layers transformers takes twice as many
        head_dim=wide.head_dim,
        v_head_dim=wide.v_head_dim,
        n_routed_experts=config.n_experts,
        num_experts_per_tok=config.top_k,
        rms_norm_eps=config.eps,
        attention_value_scale=config.value_scale,
        max_position_embeddings=config.max_context,
        sliding_window=config.mtp_layer.window,
        layer_types=[
            f"{'full' if spec.attention == 'global' else 'sliding'}_attention" for spec in config.layers
        ],
        mlp_layer_types=["dense" if spec.mlp == "dense" else "sparse" for spec in config.layers],
        rope_parameters={
            "full_attention": _rope(wide, factor),
            "sliding_attention": _rope(config.mtp_layer, factor),
        },
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def _rope(spec: LayerSpec, factor: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": spec.rope_theta, "partial_rotary_factor": factor}


def _state(config: ModelConfig, w: Weights) -> Weights:
    out = {
        "model.embed_tokens.weight": w["embed"],
        "lm_head.weight": w["head"],
        "model.norm.weight": w["norm"],
    }
    for i, spec in enumerate(config.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        out[f"{theirs}.input_layernorm.weight"] = w[f"{ours}.attn_norm"]
        out[f"{theirs}.post_attention_layernorm.weight"] = w[f"{ours}.mlp_norm"]
        kv_heads = _config(config).num_key_value_heads * (2 if spec.attention == "window" else 1)
        out |= _attention(spec, kv_heads, ours, f"{theirs}.self_attn", w)
        out |= _mlp(config, spec, ours, f"{theirs}.mlp", w)
    return out


def _attention(spec: LayerSpec, kv_heads: int, ours: str, theirs: str, w: Weights) -> Weights:
    q, k, v = w[f"{ours}.attn.qkv"].split(spec.qkv_rows)
    copies = (
        kv_heads // spec.n_kv_heads
    )  # V2.5-Pro has as many KV heads in both kinds: a head twice is the same maths
    assert copies * spec.n_kv_heads == kv_heads
    out = {
        f"{theirs}.q_proj.weight": q,
        f"{theirs}.k_proj.weight": k.unflatten(0, (spec.n_kv_heads, -1))
        .repeat_interleave(copies, 0)
        .flatten(0, 1),
        f"{theirs}.v_proj.weight": v.unflatten(0, (spec.n_kv_heads, -1))
        .repeat_interleave(copies, 0)
        .flatten(0, 1),
        f"{theirs}.o_proj.weight": w[f"{ours}.attn.o"],
    }
    return out | ({f"{theirs}.sinks": w[f"{ours}.attn.sink"]} if spec.sink else {})


def _mlp(config: ModelConfig, spec: LayerSpec, ours: str, theirs: str, w: Weights) -> Weights:
    if spec.mlp == "dense":
        return {f"{theirs}.{part}_proj.weight": w[f"{ours}.mlp.{part}"] for part in ("gate", "up", "down")}
    experts = range(config.n_experts)
    both = [torch.cat((w[f"{ours}.experts.{e}.gate"], w[f"{ours}.experts.{e}.up"])) for e in experts]
    return {
        f"{theirs}.gate.weight": w[f"{ours}.router.weight"],
        f"{theirs}.gate.e_score_correction_bias": w[f"{ours}.router.bias"],
        f"{theirs}.experts.gate_up_proj": torch.stack(both),
        f"{theirs}.experts.down_proj": torch.stack([w[f"{ours}.experts.{e}.down"] for e in experts]),
    }
