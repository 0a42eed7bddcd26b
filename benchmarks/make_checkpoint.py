"""Write a random checkpoint in the layouts that MiMo-V2 models are released in, of any size, in little memory.

    python -m benchmarks.make_checkpoint DIR --shape mid [--layers 12] [--skew 0.5]

FP8 blocks of 128 x 128 with `weight_scale_inv`, a shard per layer and 32 experts, the embedded model's tokenizer. The
weights are Gaussian (incompressible, and quantising them errs as on real ones). `--skew` spreads the router's
correction bias, so that some experts are chosen more often than others. `flash` splits q, k and v as MiMo-V2-Flash
does; `v2.5` and `pro` fuse them as V2.5 and V2.5-Pro do.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from localmimo.mini import CHECKPOINT as MINI

Tensors = dict[str, torch.Tensor]
BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """What differs between checkpoints; the rest is as in MiMo-V2-Flash."""

    hidden: int
    layers: int
    heads: int
    kv_global: int
    kv_window: int
    dense_inner: int
    experts: int
    expert_inner: int
    top_k: int
    vocab: int
    head_dim: int = 192
    v_head_dim: int = 128
    fused: bool = False


SHAPES = {
    "small": Shape(512, 8, 8, 2, 4, 1536, 64, 512, 4, 8192, 96, 64),
    "mid": Shape(2048, 12, 32, 4, 8, 8192, 128, 1024, 8, 32768),
    "pages": Shape(
        64, 48, 2, 1, 1, 128, 256, 32, 8, 8192, 128, 128
    ),  # V2-Flash's number of pages, no arithmetic
    "flash": Shape(4096, 48, 64, 4, 8, 16384, 256, 2048, 8, 152576),
    "v2.5": Shape(4096, 48, 64, 4, 8, 16384, 256, 2048, 8, 152576, fused=True),
    "pro": Shape(6144, 70, 128, 8, 8, 16384, 384, 2048, 8, 152576, fused=True),
}
SHARD_EXPERTS = 32


def config_of(shape: Shape) -> dict[str, object]:
    """config.json: every key of the released ones."""
    pattern = [0 if i == 0 or (i + 1) % 6 == 0 or i == shape.layers - 1 else 1 for i in range(shape.layers)]
    fused = {"model_type": "mimo_v2", "attention_projection_layout": "fused_qkv"} if shape.fused else {}
    return (
        json.loads((MINI / "config.json").read_text())
        | fused
        | {
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "hybrid_layer_pattern": pattern,
            "moe_layer_freq": [0] + [1] * (shape.layers - 1),
            "num_attention_heads": shape.heads,
            "swa_num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_global,
            "swa_num_key_value_heads": shape.kv_window,
            "head_dim": shape.head_dim,
            "swa_head_dim": shape.head_dim,
            "v_head_dim": shape.v_head_dim,
            "swa_v_head_dim": shape.v_head_dim,
            "intermediate_size": shape.dense_inner,
            "moe_intermediate_size": shape.expert_inner,
            "n_routed_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "vocab_size": shape.vocab,
            "max_position_embeddings": 262144,
            "num_nextn_predict_layers": 0,
        }
    )


class Writer:
    """Draws one layer's tensors at a time."""

    def __init__(self, shape: Shape, skew: float, seed: int) -> None:
        self.shape = shape
        self.skew = skew
        self.random = torch.Generator().manual_seed(seed)

    def shards(self, config: dict[str, object]) -> Iterator[tuple[str, Tensors]]:
        shape = self.shape
        outer = {
            "model.embed_tokens.weight": self._normal(shape.vocab, shape.hidden).bfloat16(),
            "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
            "lm_head.weight": (self._normal(shape.vocab, shape.hidden) * (2 / shape.hidden**0.5)).bfloat16(),
        }
        yield "outer", outer
        for layer, window in enumerate(config["hybrid_layer_pattern"]):  # type: ignore[arg-type]
            yield f"layer-{layer:03d}", self._layer(layer, bool(window))
            if layer:
                for first in range(0, shape.experts, SHARD_EXPERTS):
                    yield f"layer-{layer:03d}-experts-{first:03d}", self._experts(layer, first)

    def _experts(self, layer: int, first: int) -> Tensors:
        out: Tensors = {}
        for expert in range(first, min(first + SHARD_EXPERTS, self.shape.experts)):
            out |= self._mlp(f"model.layers.{layer}.mlp.experts.{expert}", self.shape.expert_inner)
        return out

    def _layer(self, layer: int, window: bool) -> Tensors:
        shape, prefix = self.shape, f"model.layers.{layer}"
        ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
        out = {
            f"{prefix}.input_layernorm.weight": ones,
            f"{prefix}.post_attention_layernorm.weight": ones.clone(),
        }
        out |= self._attention(f"{prefix}.self_attn", window)
        if layer == 0:
            return out | self._mlp(f"{prefix}.mlp", shape.dense_inner)
        out[f"{prefix}.mlp.gate.weight"] = self._normal(shape.experts, shape.hidden) / shape.hidden**0.5
        out[f"{prefix}.mlp.gate.e_score_correction_bias"] = self._normal(shape.experts) * self.skew
        return out

    def _attention(self, prefix: str, window: bool) -> Tensors:
        shape = self.shape
        kv = shape.kv_window if window else shape.kv_global
        out = self._fused(prefix, kv) if shape.fused else self._split(prefix, kv, window)
        if window:
            out[f"{prefix}.attention_sink_bias"] = self._normal(shape.heads).bfloat16()
        o = (
            self._normal(shape.hidden, shape.heads * shape.v_head_dim)
            / (shape.heads * shape.v_head_dim) ** 0.5
        )
        return out | {f"{prefix}.o_proj.weight": o.bfloat16()}

    def _split(self, prefix: str, kv: int, window: bool) -> Tensors:
        shape = self.shape
        out = self._fp8(f"{prefix}.q_proj", shape.heads * shape.head_dim, shape.hidden)
        keys = self._fp8(f"{prefix}.k_proj", kv * shape.head_dim, shape.hidden)
        values = self._fp8(f"{prefix}.v_proj", kv * shape.v_head_dim, shape.hidden)
        if not window:
            self._joint_grid(prefix, keys, kv)
        return out | keys | values

    def _fused(self, prefix: str, kv: int) -> Tensors:
        """Shards [Q | K | V], as many as a global layer has KV heads; the scale grid restarts in each."""
        shape, shards = self.shape, self.shape.kv_global
        rows = shape.heads * shape.head_dim + kv * (shape.head_dim + shape.v_head_dim)
        out = self._fp8(f"{prefix}.qkv_proj", rows, shape.hidden)
        scale = out[f"{prefix}.qkv_proj.weight_scale_inv"]
        n_scale_rows = shards * -(-rows // shards // BLOCK)
        out[f"{prefix}.qkv_proj.weight_scale_inv"] = scale[:1].expand(n_scale_rows, -1).contiguous()
        return out

    def _joint_grid(self, prefix: str, keys: Tensors, kv: int) -> None:
        """V2-Flash's global layers: K's scale grid restarts in every KV head (its last block reaches into V)."""
        rows = kv * -(-self.shape.head_dim // BLOCK)
        scale = keys[f"{prefix}.k_proj.weight_scale_inv"]
        keys[f"{prefix}.k_proj.weight_scale_inv"] = scale[:1].expand(rows, -1).contiguous()

    def _mlp(self, prefix: str, inner: int) -> Tensors:
        out = self._fp8(f"{prefix}.gate_proj", inner, self.shape.hidden)
        out |= self._fp8(f"{prefix}.up_proj", inner, self.shape.hidden)
        return out | self._fp8(f"{prefix}.down_proj", self.shape.hidden, inner)

    def _fp8(self, name: str, rows: int, cols: int) -> Tensors:
        """Codes as of a Gaussian whose block maximum lies near 448; the scale brings the gain to 1 / sqrt(cols)."""
        codes = (self._normal(rows, cols) * 100).clamp_(-448, 448).to(torch.float8_e4m3fn)
        scale = torch.full((-(-rows // BLOCK), -(-cols // BLOCK)), 0.01 * cols**-0.5)
        return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)


def make_checkpoint(folder: Path, shape: Shape, skew: float = 0.0, seed: int = 0) -> Path:
    """Write the checkpoint; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MINI / name, folder)
    weight_map: dict[str, str] = {}
    for name, tensors in Writer(shape, skew, seed).shards(config):
        file = f"model-{name}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers:
        shape = Shape(**{**vars(shape), "layers": options.layers})
    make_checkpoint(options.folder, shape, options.skew, options.seed)


if __name__ == "__main__":
    main()
