"""The published config.json of two members of the family, without what the tiny one says as well."""

from localmimo.model.config import ModelConfig
from tests.tiny import make_config

# The published values (see the docstring of localmimo/model/config.py); counts of layers by kind, and sizes.
FLASH = {
    "model_type": "mimo_v2_flash",
    "hidden_size": 4096,
    "num_hidden_layers": 48,
    "hybrid_layer_pattern": [0 if i == 0 or (i + 1) % 6 == 0 else 1 for i in range(48)],
    "moe_layer_freq": [0] + [1] * 47,
    "num_attention_heads": 64,
    "swa_num_attention_heads": 64,
    "num_key_value_heads": 4,
    "swa_num_key_value_heads": 8,
    "head_dim": 192,
    "swa_head_dim": 192,
    "v_head_dim": 128,
    "swa_v_head_dim": 128,
    "sliding_window": 128,
    "sliding_window_size": 128,
    "attention_chunk_size": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 16384,
    "vocab_size": 152576,
    "max_position_embeddings": 262144,
}
PRO = FLASH | {
    "model_type": "mimo_v2",
    "attention_projection_layout": "fused_qkv",
    "hidden_size": 6144,
    "num_hidden_layers": 70,
    "hybrid_layer_pattern": [0 if i in (0, 7, 15, 23, 31, 39, 47, 55, 62, 69) else 1 for i in range(70)],
    "moe_layer_freq": [0] + [1] * 69,
    "num_attention_heads": 128,
    "swa_num_attention_heads": 128,
    "num_key_value_heads": 8,
    "swa_num_key_value_heads": 8,
    "rope_theta": 10_000_000,
    "attention_value_scale": 0.612,
    "n_routed_experts": 384,
    "max_position_embeddings": 1048576,
}


def parse(published: dict[str, object], **changes: object) -> ModelConfig:
    return ModelConfig.parse(
        make_config("split-bf16", num_hidden_layers=len(published["hybrid_layer_pattern"]))
        | published
        | changes
    )
