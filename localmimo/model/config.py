"""ModelConfig: a checkpoint's config.json, read strictly, as the facts the maths needs.

An unknown key that may change the maths is an error that names it; no value is assumed.
Knows nothing of tensors, files or machines. Values and defaults: the public configurations of MiMo-V2-Flash,
V2.5, V2.5-Pro and V2.6, and the configuration class in transformers 5.23 (`mimo_v2_flash`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localmimo.errors import BadModel
from quant.checkpoint.geometry import MAX_EXPERTS, MAX_LAYERS
from quant.files.bounded import CONFIG_BYTES, read_small

MODEL_TYPES = ("mimo_v2_flash", "mimo_v2")
MAX_NUMBER = 1 << 53  # beyond this, and for what is no number, floats stop being counts
N_MTP_SHIPPED = 3  # V2-Flash and V2.5 ship three draft blocks without a config key that says so

# Read below.
_USED = frozenset(
    """model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads
    swa_num_attention_heads swa_num_key_value_heads head_dim swa_head_dim v_head_dim swa_v_head_dim
    partial_rotary_factor rope_theta swa_rope_theta sliding_window sliding_window_size hybrid_layer_pattern
    moe_layer_freq add_swa_attention_sink_bias add_full_attention_sink_bias attention_value_scale
    intermediate_size moe_intermediate_size n_routed_experts num_experts_per_tok routed_scaling_factor
    norm_topk_prob layernorm_epsilon rms_norm_eps max_position_embeddings moe_router_dtype
    num_nextn_predict_layers rope_parameters layer_types mlp_layer_types""".split()
)

# Would change the maths if they had another value: only these are supported.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "tie_word_embeddings": (False,),
    "n_group": (1, None),
    "topk_group": (1, None),
    "topk_method": ("noaux_tc",),
    "scoring_func": ("sigmoid",),
    "n_shared_experts": (None, 0),
    "hybrid_block_size": (None,),
    "rope_scaling": (None,),
    "attention_projection_layout": ("split", "fused_qkv", None),
    "moe_router_dtype": (None, "float32", "bfloat16"),
    "use_qk_norm": (False, None),
}

# Say nothing about the maths of the text model. `attention_chunk_size` is set in every release and used by none.
_IGNORED = frozenset(
    """architectures attention_chunk_size auto_map bos_token_id dtype eos_token_id id2label initializer_range
    is_decoder is_encoder_decoder label2id name_or_path _name_or_path output_attentions output_hidden_states
    pad_token_id problem_type processor_config quantization_config return_dict tokenizer_class torch_dtype
    transformers_version use_cache _attn_implementation chunk_size_feed_forward""".split()
)
_TOWERS = ("audio_", "image_", "video_", "vision_")  # V2.5's inputs other than text, which this runtime skips


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: which attention, which MLP, and the attention's sizes."""

    attention: Literal["window", "global"]
    mlp: Literal["dense", "moe"]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    rotary_dim: int
    rope_theta: float
    window: int | None  # keys visible with the token itself; None = all
    sink: bool

    @property
    def rope(self) -> tuple[int, float]:
        """What the rotation depends on: rotary dimensions and theta."""
        return self.rotary_dim, self.rope_theta

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of Q, K and V in the joined projection."""
        return (
            self.n_heads * self.head_dim,
            self.n_kv_heads * self.head_dim,
            self.n_kv_heads * self.v_head_dim,
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A MiMo-V2 model's shape and constants."""

    vocab_size: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    mtp_layer: LayerSpec
    n_mtp: int
    dense_inner: int
    expert_inner: int
    n_experts: int
    top_k: int
    routed_scale: float
    norm_topk: bool
    router_bf16: bool
    value_scale: float
    eps: float
    max_context: int

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.mlp == "moe")

    @property
    def pages_per_token(self) -> int:
        """Experts that one token uses: one token cycle."""
        return self.top_k * len(self.moe_layers)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], window_keys: int | None = None) -> "ModelConfig":
        """Read a config.json's content. Raises BadModel naming the key that is unknown, missing or unsupported.

        window_keys overrides the number of keys a window layer sees (the default is `sliding_window`, as in
        Xiaomi's own code: i - j < 128; transformers 5.23 uses one more).
        """
        _check_keys(raw)
        reader = _Reader(raw)
        layers = _layers(reader, window_keys)
        return cls(
            vocab_size=reader.count("vocab_size"),
            hidden=reader.count("hidden_size"),
            layers=layers,
            mtp_layer=_layer(reader, "window", "dense", window_keys),
            n_mtp=reader.count("num_nextn_predict_layers", N_MTP_SHIPPED, least=0, most=MAX_LAYERS),
            dense_inner=reader.count("intermediate_size"),
            expert_inner=reader.count("moe_intermediate_size"),
            n_experts=reader.count("n_routed_experts", most=MAX_EXPERTS),
            top_k=_top_k(reader),
            routed_scale=reader.number("routed_scaling_factor", 1.0),
            norm_topk=bool(reader.get("norm_topk_prob", True)),
            router_bf16=reader.get("moe_router_dtype", None) == "bfloat16",
            value_scale=reader.number("attention_value_scale", 1.0),
            eps=reader.number("layernorm_epsilon", None, "rms_norm_eps"),
            max_context=reader.count("max_position_embeddings"),
        )

    @classmethod
    def open(cls, path: Path) -> "ModelConfig":
        """Read config.json at `path`."""
        try:
            raw = json.loads(read_small(path, CONFIG_BYTES).decode("utf-8"))
        except FileNotFoundError:
            raise BadModel(f"{path} is missing: give a folder that holds a MiMo-V2 config.json.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise BadModel(f"{path} cannot be read as JSON: {error}.") from None
        return cls.parse(raw)


def _check_keys(raw: Mapping[str, Any]) -> None:
    if not isinstance(raw, Mapping):
        raise BadModel(f"config.json holds a {type(raw).__name__}, not an object.")
    family = raw.get("model_type") or "mimo_v2_flash"  # the released V2-Flash class leaves it empty
    if family not in MODEL_TYPES:
        raise BadModel(
            f'config.json says model_type "{family}": localmimo runs only {" and ".join(MODEL_TYPES)}.'
        )
    for key, value in raw.items():
        if key in _FIXED and value not in _FIXED[key]:
            raise BadModel(f"config.json sets {key} = {value!r}; only {_FIXED[key][0]!r} is supported.")
        known = key in _USED or key in _FIXED or key in _IGNORED or key.startswith(_TOWERS)
        if not known:
            raise BadModel(
                f'config.json has the key "{key}", which localmimo does not know and which may change the maths.'
            )


class _Reader:
    """Typed access to a raw config, with errors that name the key."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None, *aliases: str) -> float:
        value = next((self.raw[k] for k in (key, *aliases) if self.raw.get(k) is not None), default)
        if value is None:
            raise BadModel(f'config.json lacks "{key}".')
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadModel(f"config.json has {key} = {value!r}, which is not a number.")
        if not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise BadModel(f"config.json has {key} = {str(value)[:40]}, which is no size of a model.")
        return float(value)

    def count(
        self, key: str, default: int | None = None, *aliases: str, least: int = 1, most: int = (1 << 31) - 1
    ) -> int:
        value = self.number(key, default, *aliases)
        if value != int(value) or not least <= value <= most:
            raise BadModel(
                f"config.json has {key} = {value:g}; it must be a whole number from {least} to {most:,}."
            )
        return int(value)

    def per_layer(self, key: str, n: int, default: int) -> list[int]:
        value = self.get(key, [default] * n)
        if not isinstance(value, list) or len(value) != n or any(item not in (0, 1) for item in value):
            length = f"{len(value)} entries" if isinstance(value, list) else repr(value)
            raise BadModel(f"config.json has {key} with {length}; it must be a list of {n} zeros and ones.")
        return [int(item) for item in value]


def _layers(reader: _Reader, window_keys: int | None) -> tuple[LayerSpec, ...]:
    n = reader.count("num_hidden_layers", most=MAX_LAYERS)
    windows = reader.per_layer("hybrid_layer_pattern", n, 0)  # 1 = sliding window
    experts = reader.per_layer("moe_layer_freq", n, 0)
    _agree(
        reader,
        "layer_types",
        "hybrid_layer_pattern",
        ["sliding_attention" if w else "full_attention" for w in windows],
    )
    _agree(reader, "mlp_layer_types", "moe_layer_freq", ["sparse" if e else "dense" for e in experts])
    return tuple(
        _layer(reader, "window" if window else "global", "moe" if moe else "dense", window_keys)
        for window, moe in zip(windows, experts, strict=True)
    )


def _agree(reader: _Reader, key: str, flat_key: str, expected: list[str]) -> None:
    """transformers writes the same lists under other names: they must not say something else."""
    if reader.get(key, expected) != expected:
        raise BadModel(f"config.json's {key} and {flat_key} disagree: remove one of them.")


def _layer(
    reader: _Reader,
    attention: Literal["window", "global"],
    mlp: Literal["dense", "moe"],
    window_keys: int | None,
) -> LayerSpec:
    swa = "swa_" if attention == "window" else ""
    head_dim = reader.count(f"{swa}head_dim", None, "head_dim")
    spec = LayerSpec(
        attention=attention,
        mlp=mlp,
        n_heads=reader.count(f"{swa}num_attention_heads", None, "num_attention_heads"),
        n_kv_heads=reader.count(f"{swa}num_key_value_heads", None, "num_key_value_heads"),
        head_dim=head_dim,
        v_head_dim=reader.count(f"{swa}v_head_dim", None, "v_head_dim"),
        rotary_dim=int(head_dim * reader.number("partial_rotary_factor", 1.0)),
        rope_theta=_theta(reader, attention),
        window=_window(reader, window_keys) if swa else None,
        sink=bool(
            reader.get("add_swa_attention_sink_bias" if swa else "add_full_attention_sink_bias", False)
        ),
    )
    if spec.n_heads % spec.n_kv_heads:
        raise BadModel(
            f"config.json has {spec.n_heads} query heads on {spec.n_kv_heads} KV heads, which do not divide."
        )
    if spec.rotary_dim % 2:
        raise BadModel(f"config.json gives {spec.rotary_dim} rotary dimensions; the number must be even.")
    return spec


def _theta(reader: _Reader, attention: str) -> float:
    flat = "swa_rope_theta" if attention == "window" else "rope_theta"
    nested = reader.get("rope_parameters", {})
    part = "sliding_attention" if attention == "window" else "full_attention"
    kind = nested.get(part, {}) if isinstance(nested, Mapping) else None
    if not isinstance(kind, Mapping):
        raise BadModel(f"config.json has rope_parameters that are no objects: {str(nested)[:100]}.")
    if kind.get("rope_type", "default") != "default":
        raise BadModel(f"config.json sets rope_type = {kind['rope_type']!r}; only 'default' is supported.")
    return _Reader(kind).number("rope_theta", None) if "rope_theta" in kind else reader.number(flat, None)


def _window(reader: _Reader, window_keys: int | None) -> int:
    return window_keys or reader.count("sliding_window", None, "sliding_window_size")


def _top_k(reader: _Reader) -> int:
    top_k, n_experts = reader.count("num_experts_per_tok"), reader.count("n_routed_experts")
    if top_k > n_experts:
        raise BadModel(f"config.json asks for {top_k} experts per token but has {n_experts}.")
    return top_k
