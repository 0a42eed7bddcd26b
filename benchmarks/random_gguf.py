"""Write a random GGUF of llama.cpp's `mimo2` architecture in the shape of a checkpoint, for comparisons.

    python -m benchmarks.random_gguf CONFIG.json OUT.gguf [--type Q4_0|Q8_0] [--skew 0.5]

Runs in the rival's environment (package `gguf`; no torch). CONFIG.json is a checkpoint's or a pack's. Every matrix has
random codes under a scale that gives it the gain of 1 / sqrt(columns), so that routing is as it is in
`benchmarks.make_checkpoint`; router, norms and sinks are float32. There is no vocabulary: tokens are numbers.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Planned:
    """A tensor that will be drawn when its turn comes; `gain` is the standard deviation of its values."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    gain: float = 0.0


class Draw:
    """Draws packed tensors."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def tensor(self, planned: Planned) -> Array:
        """The bytes of a quantized tensor, or float32 values."""
        if planned.kind == gguf.GGMLQuantizationType.F32:
            return self._floats(planned)
        block, block_bytes = gguf.GGML_QUANT_SIZES[planned.kind]
        n_blocks = int(np.prod(planned.shape)) // block
        packed = (
            np.frombuffer(self._random.bytes(n_blocks * block_bytes), np.uint8).reshape(n_blocks, -1).copy()
        )
        spread = 4.6 if block_bytes == 18 else 74.0  # of uniform codes of four bits, of eight
        packed[:, :2] = np.frombuffer(np.float16(planned.gain / spread).tobytes(), np.uint8)
        # Codes of four bits have a mean; scales of either sign take it out, else every token routes alike.
        packed[:, 1] ^= self._random.integers(0, 2, n_blocks, np.uint8) << 7
        return packed.reshape(*planned.shape[:-1], -1)

    def _floats(self, planned: Planned) -> Array:
        if planned.gain == 0:
            return np.ones(planned.shape, np.float32)
        return self._random.standard_normal(planned.shape).astype(np.float32) * np.float32(planned.gain)


def planned_tensors(
    config: dict[str, Any], kind: gguf.GGMLQuantizationType, skew: float
) -> Iterator[Planned]:
    """Every tensor, in the order of the file."""
    hidden, f32 = config["hidden_size"], gguf.GGMLQuantizationType.F32
    yield Planned("token_embd.weight", (config["vocab_size"], hidden), kind, 1.0)
    yield Planned("output_norm.weight", (hidden,), f32)
    yield Planned("output.weight", (config["vocab_size"], hidden), kind, 2 * hidden**-0.5)
    for layer, window in enumerate(config["hybrid_layer_pattern"]):
        yield from _attention(config, f"blk.{layer}", bool(window), kind)
        yield Planned(f"blk.{layer}.ffn_norm.weight", (hidden,), f32)
        if config["moe_layer_freq"][layer]:
            yield from _experts(config, f"blk.{layer}", kind, skew)
        else:
            yield from _mlp(f"blk.{layer}.ffn_{{}}.weight", (), hidden, config["intermediate_size"], kind)


def _attention(
    config: dict[str, Any], prefix: str, window: bool, kind: gguf.GGMLQuantizationType
) -> Iterator[Planned]:
    hidden, heads, f32 = config["hidden_size"], config["num_attention_heads"], gguf.GGMLQuantizationType.F32
    kv = config["swa_num_key_value_heads" if window else "num_key_value_heads"]
    yield Planned(f"{prefix}.attn_norm.weight", (hidden,), f32)
    yield Planned(f"{prefix}.attn_q.weight", (heads * config["head_dim"], hidden), kind, hidden**-0.5)
    yield Planned(f"{prefix}.attn_k.weight", (kv * config["head_dim"], hidden), kind, hidden**-0.5)
    yield Planned(f"{prefix}.attn_v.weight", (kv * config["v_head_dim"], hidden), kind, hidden**-0.5)
    inner = heads * config["v_head_dim"]
    yield Planned(f"{prefix}.attn_output.weight", (hidden, inner), kind, inner**-0.5)
    if window:
        yield Planned(f"{prefix}.attn_sinks.weight", (heads,), f32, 1.0)


def _experts(
    config: dict[str, Any], prefix: str, kind: gguf.GGMLQuantizationType, skew: float
) -> Iterator[Planned]:
    hidden, n, f32 = config["hidden_size"], config["n_routed_experts"], gguf.GGMLQuantizationType.F32
    yield Planned(f"{prefix}.ffn_gate_inp.weight", (n, hidden), f32, hidden**-0.5)
    yield Planned(f"{prefix}.exp_probs_b.bias", (n,), f32, skew or 1e-9)
    yield from _mlp(f"{prefix}.ffn_{{}}_exps.weight", (n,), hidden, config["moe_intermediate_size"], kind)


def _mlp(
    name: str, lead: tuple[int, ...], hidden: int, inner: int, kind: gguf.GGMLQuantizationType
) -> Iterator[Planned]:
    yield Planned(name.format("gate"), (*lead, inner, hidden), kind, hidden**-0.5)
    yield Planned(name.format("up"), (*lead, inner, hidden), kind, hidden**-0.5)
    yield Planned(name.format("down"), (*lead, hidden, inner), kind, inner**-0.5)


def write_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """What the file says about the model."""
    pattern = [bool(window) for window in config["hybrid_layer_pattern"]]
    kv = [config["swa_num_key_value_heads" if window else "num_key_value_heads"] for window in pattern]
    writer.add_block_count(len(pattern))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(kv)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["v_head_dim"])
    writer.add_layer_norm_rms_eps(config["layernorm_epsilon"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_rope_freq_base_swa(float(config["swa_rope_theta"]))
    writer.add_rope_dimension_count(int(config["head_dim"] * config["partial_rotary_factor"]))
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(pattern)
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def make_model(
    config: dict[str, Any], out: Path, kind: str = "Q4_0", skew: float = 0.0, seed: int = 0
) -> Path:
    """Write the file, one tensor in memory at a time."""
    type_, draw = gguf.GGMLQuantizationType[kind], Draw(seed)
    writer = gguf.GGUFWriter(out, "mimo2")
    write_facts(writer, config)
    tensors = list(planned_tensors(config, type_, skew))
    for planned in tensors:
        elements = int(np.prod(planned.shape))
        if planned.kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), elements * 4)
            continue
        block, block_bytes = gguf.GGML_QUANT_SIZES[planned.kind]
        packed = (*planned.shape[:-1], planned.shape[-1] // block * block_bytes)
        nbytes = elements // block * block_bytes
        writer.add_tensor_info(planned.name, packed, np.dtype(np.uint8), nbytes, raw_dtype=planned.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for planned in tensors:
        writer.write_tensor_data(draw.tensor(planned))
    writer.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="Q4_0", choices=("Q4_0", "Q8_0"))
    parser.add_argument("--skew", type=float, default=0.0)
    options = parser.parse_args()
    out = make_model(json.loads(options.config.read_text()), options.out, options.type, options.skew)
    print(f"{out}: {out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
