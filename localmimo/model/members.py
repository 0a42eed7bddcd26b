"""The MiMo-V2 family: each member's published config.json, what is known of its release, and its official server.

Facts only, nothing is computed here. A test holds every member's tensors against the published totals. Where a value
was never published (MiMo-V2-Pro's weights and config), the card says that its shape is described, not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How SGLang's cookbook page for a member launches it: hardware, and the flags that differ."""

    hardware: str
    flags: str


@dataclass(frozen=True, slots=True)
class Member:
    """One model of the family."""

    name: str  # as it is written on a command line
    title: str
    repository: str | None  # on the hub; None: no weights are public
    config: Config
    server: ServerCommand | None
    n_elements: int | None = None  # published: all tensors, scales included
    note: str = ""

    def serve_command(self) -> str | None:
        """The official engine's launch command: SGLang, the same checkpoint, the same OpenAI API.

        None where there are no weights to serve.
        """
        if self.server is None:
            return None
        return (
            f"python3 -m sglang.launch_server --model-path {self.repository} {self.server.flags} --trust-remote-code "
            f"--context-length {self.config['max_position_embeddings']} "
            "--reasoning-parser mimo --tool-call-parser mimo"
        )


def _windows(n_layers: int, global_layers: tuple[int, ...]) -> list[int]:
    return [int(layer not in global_layers) for layer in range(n_layers)]


def _fp8(n_layers: int, **more: Any) -> Config:
    kept = [f"model.layers.{n}.self_attn.o_proj" for n in range(n_layers)]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "ignored_layers": [*kept, "model.decoder.self_attn.o_proj"],
        **more,
    }


# The same in every member.
_COMMON: Config = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "vocab_size": 152576,
    "head_dim": 192,
    "swa_head_dim": 192,
    "v_head_dim": 128,
    "swa_v_head_dim": 128,
    "partial_rotary_factor": 0.334,
    "swa_rope_theta": 10_000,
    "sliding_window": 128,
    "sliding_window_size": 128,
    "attention_chunk_size": 128,
    "hybrid_block_size": None,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": None,
    "n_shared_experts": None,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 16384,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "layernorm_epsilon": 1e-5,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}

_FLASH_SIZES: Config = _COMMON | {
    "hidden_size": 4096,
    "num_hidden_layers": 48,
    "hybrid_layer_pattern": _windows(48, (0, 5, 11, 17, 23, 29, 35, 41, 47)),
    "moe_layer_freq": [0] + [1] * 47,
    "num_attention_heads": 64,
    "swa_num_attention_heads": 64,
    "num_key_value_heads": 4,
    "swa_num_key_value_heads": 8,
    "attention_value_scale": 0.707,
    "n_routed_experts": 256,
}

_PRO_SIZES: Config = _COMMON | {
    "hidden_size": 6144,
    "num_hidden_layers": 70,
    "hybrid_layer_pattern": _windows(70, (0, 7, 15, 23, 31, 39, 47, 55, 62, 69)),
    "moe_layer_freq": [0] + [1] * 69,
    "num_attention_heads": 128,
    "swa_num_attention_heads": 128,
    "num_key_value_heads": 8,
    "swa_num_key_value_heads": 8,
    "attention_value_scale": 0.612,
    "n_routed_experts": 384,
}

_NEWER: Config = {  # V2.5 and later
    "architectures": ["MiMoV2ForCausalLM"],
    "model_type": "mimo_v2",
    "rope_theta": 10_000_000,
    "max_position_embeddings": 1_048_576,
    "attention_projection_layout": "fused_qkv",
}

_FLASH: Config = _FLASH_SIZES | {
    "architectures": ["MiMoV2FlashForCausalLM"],
    "model_type": "mimo_v2_flash",
    "rope_theta": 5_000_000,
    "max_position_embeddings": 262_144,
    "quantization_config": _fp8(48, packed_modules_mapping={}),
}

_TOWERS: Config = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "audio_token_id": 151669,
    "video_start_token_id": 151670,
    "video_end_token_id": 151671,
    "audio_start_token_id": 151673,
    "audio_end_token_id": 151674,
    "vision_config": {
        "depth": 28,
        "hidden_size": 1280,
        "intermediate_size": 4608,
        "num_heads": 32,
        "num_key_value_heads": 8,
        "qk_channels": 64,
        "out_hidden_size": 4096,
        "in_chans": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "fullatt_block_indexes": [0, 9, 18, 27],
    },
    "audio_config": {
        "audio_channels": 20,
        "group_size": 4,
        "input_local_dim": 1024,
        "input_local_layers": 6,
        "input_local_intermediate_size": 4096,
        "out_hidden_size": 4096,
        "speech_vocab_size": "1280",
    },
}

_V25: Config = _FLASH_SIZES | _NEWER | {"quantization_config": _fp8(48, store_dtype="fp8")}
_PRO: Config = _PRO_SIZES | _NEWER | {"quantization_config": _fp8(70, store_dtype="fp8")}
_V26: Config = {
    "layernorm_epsilon": 1e-6,
    "num_nextn_predict_layers": 3,
    "moe_router_dtype": "bfloat16",
}


def _mxfp4(n_layers: int) -> Config:
    return {"quantization_config": _fp8(n_layers, store_dtype="mxfp4", mxfp4_block_size=32)}


_TEXT_ONLY = "Text only; the towers of its release are skipped and not listed here."

_EAGLE = (
    "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4 --enable-multi-layer-eagle"
)
_ON_FLASH = ServerCommand(
    "8 x H100 or H200",
    "--tp-size 8 --dp-size 2 --enable-dp-attention --mem-fraction-static 0.75 --attention-backend fa3 "
    "--chunked-prefill-size 16384 " + _EAGLE,
)
_ON_V25 = ServerCommand(
    "8 x H100 or H200",
    "--tp-size 8 --dp-size 2 --enable-dp-attention --enable-dp-lm-head --mm-enable-dp-encoder "
    "--mem-fraction-static 0.65 --attention-backend fa3 --chunked-prefill-size 16384 " + _EAGLE,
)
_ON_PRO = ServerCommand(
    "8 x B200",
    "--tp-size 8 --attention-backend fa4 --moe-runner-backend flashinfer_trtllm --mem-fraction-static 0.8 "
    "--swa-full-tokens-ratio 0.1 " + _EAGLE,
)


def _on_v26(gpus: int, memory: float, ratio: float) -> ServerCommand:
    return ServerCommand(
        f"{gpus} x B300",
        f"--tp-size {gpus} --ep-size {gpus} --moe-runner-backend deep_gemm --moe-a2a-backend deepep "
        "--moe-dense-tp-size 1 --enable-dp-lm-head --attention-backend fa4 --mm-attention-backend fa4 "
        f"--mm-enable-dp-encoder --mem-fraction-static {memory} --swa-full-tokens-ratio {ratio} --page-size 1",
    )


MEMBERS = (
    Member("mimo-v2-flash", "MiMo-V2-Flash", "XiaomiMiMo/MiMo-V2-Flash", _FLASH, _ON_FLASH),
    Member("mimo-v2-flash-base", "MiMo-V2-Flash-Base", "XiaomiMiMo/MiMo-V2-Flash-Base", _FLASH, _ON_FLASH),
    Member("mimo-v2.5", "MiMo-V2.5", "XiaomiMiMo/MiMo-V2.5", _V25 | _TOWERS, _ON_V25, 310_775_040_000),
    Member("mimo-v2.5-base", "MiMo-V2.5-Base", "XiaomiMiMo/MiMo-V2.5-Base", _V25 | _TOWERS, _ON_V25),
    Member("mimo-v2.5-pro", "MiMo-V2.5-Pro", "XiaomiMiMo/MiMo-V2.5-Pro", _PRO, _ON_PRO, 1_023_244_718_976),
    Member("mimo-v2.5-pro-base", "MiMo-V2.5-Pro-Base", "XiaomiMiMo/MiMo-V2.5-Pro-Base", _PRO, _ON_PRO),
    Member(
        "mimo-v2.6-flash",
        "MiMo-V2.6-Flash-RL",
        "XiaomiMiMo/MiMo-V2.6-Flash-RL",
        _V25 | _V26 | _mxfp4(48),
        _on_v26(4, 0.6, 0.03),
        note=_TEXT_ONLY,
    ),
    Member(
        "mimo-v2.6-pro",
        "MiMo-V2.6-Pro-RL",
        "XiaomiMiMo/MiMo-V2.6-Pro-RL",
        _PRO | _V26 | _mxfp4(70),
        _on_v26(8, 0.7, 0.08),
        note=_TEXT_ONLY,
    ),
    Member(
        "mimo-v2-pro",
        "MiMo-V2-Pro",
        None,
        _PRO,
        None,
        note="Its weights are not public: this is its described shape (1T parameters, 42B active), "
        "taken to be that of V2.5-Pro.",
    ),
)


def find_member(name: str) -> Member | None:
    """The member of that name or repository on the hub, in any capitals; None where there is none."""
    name = name.lower()
    return next((m for m in MEMBERS if name in (m.name, (m.repository or m.name).lower())), None)


def member_like(config: Config) -> Member | None:
    """The first member whose layout and sizes a config has: for its launch command, not for its weights."""
    keys = ("model_type", "hidden_size", "num_hidden_layers", "n_routed_experts", "layernorm_epsilon")
    return next((m for m in MEMBERS if all(m.config.get(k) == config.get(k) for k in keys)), None)
