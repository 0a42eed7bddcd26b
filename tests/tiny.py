"""Random checkpoints in the layouts that MiMo-V2 models are published in, and a literal second reading of
them.

`make_checkpoint` writes a folder that looks like a download. `oracle_weights` reads such a folder back by
following the published layout descriptions word for word, one special case after the other. It must not know
`quant`: the tests hold the two readings against each other.

The default shape is the real one divided by eight where it matters: heads of 24 and 16 rows with FP8 blocks
of 16 behave like heads of 192 and 128 rows with blocks of 128, half-filled scale blocks included.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LAYOUTS = ("split-bf16", "split-fp8", "fused-fp8", "fused-mxfp4")
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def make_checkpoint(
    folder: str | Path,
    *,
    layout: str = "split-bf16",
    seed: int = 0,
    mtp: int = 3,
    n_shards: int = 3,
    joint_kv: bool = True,
    **overrides: object,
) -> Path:
    """Write a random checkpoint and return its folder; `overrides` replace keys of config.json.

    `joint_kv=False` stores K and V of every layer of the split layout with plain scale grids of their own.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(layout, mtp=mtp, **overrides)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_shards(folder, _Writer(config, layout, seed, joint_kv).tensors(mtp), n_shards)
    return folder


def make_config(layout: str = "split-bf16", *, mtp: int = 3, **overrides: object) -> dict:
    """The config.json of a tiny model, with every key of the published ones that is not about images or
    sound."""
    n_layers = int(overrides.get("num_hidden_layers", 5))  # type: ignore[call-overload]
    config: dict = {
        "architectures": ["MiMoV2FlashForCausalLM" if layout.startswith("split") else "MiMoV2ForCausalLM"],
        "model_type": "mimo_v2_flash" if layout.startswith("split") else "mimo_v2",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "head_dim": 24,
        "v_head_dim": 16,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "partial_rotary_factor": 0.334,
        "rope_theta": 5_000_000 if layout.startswith("split") else 10_000_000,
        "swa_rope_theta": 10_000,
        "sliding_window": 8,
        "sliding_window_size": 8,
        "attention_chunk_size": 8,
        "hybrid_block_size": None,
        "hybrid_layer_pattern": [0 if n % 3 == 0 else 1 for n in range(n_layers)],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_value_scale": 0.707,
        "tie_word_embeddings": False,
        "vocab_size": 160,
        "max_position_embeddings": 4096,
        "layernorm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
        "moe_layer_freq": [0] + [1] * (n_layers - 1),
        "eos_token_id": 2,
        "pad_token_id": 1,
        "bos_token_id": None,
    }
    config.update(_layout_keys(layout, mtp, n_layers))
    config.update(overrides)
    return config


def _layout_keys(layout: str, mtp: int, n_layers: int) -> dict:
    if layout == "split-bf16":
        return {}
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
        "ignored_layers": [f"model.layers.{n}.self_attn.o_proj" for n in range(n_layers)]
        + ["model.decoder.self_attn.o_proj"],
    }
    if layout == "split-fp8":
        return {"quantization_config": {**quantization, "packed_modules_mapping": {}}}
    fused = {"attention_projection_layout": "fused_qkv"}
    if layout == "fused-fp8":
        return {**fused, "quantization_config": {**quantization, "store_dtype": "fp8"}}
    quantization |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    newer = {"num_nextn_predict_layers": mtp, "moe_router_dtype": "bfloat16", "layernorm_epsilon": 1e-6}
    return {**fused, **newer, "quantization_config": quantization}


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], n_shards: int) -> None:
    """Spread tensors over shards, MTP blocks in a file of their own, names sorted as strings as the hub
    does."""
    main = sorted(name for name in tensors if not name.startswith("model.mtp."))
    drafts = sorted(name for name in tensors if name.startswith("model.mtp."))
    per_shard = -(-len(main) // n_shards)
    parts = {
        f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors": main[i * per_shard : (i + 1) * per_shard]
        for i in range(n_shards)
    }
    if drafts:
        parts["model_mtp.safetensors"] = drafts
    for file, names in parts.items():
        save_file(
            {name: tensors[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"}
        )
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in parts.items() for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


class _Writer:
    """Draws weights with a seeded generator and stores them as one layout does."""

    def __init__(self, config: dict, layout: str, seed: int, joint_kv: bool) -> None:
        self.config = config
        self.layout = layout
        self.joint_kv = joint_kv
        self.random = torch.Generator().manual_seed(seed)
        quantization = config.get("quantization_config") or {}
        self.block = tuple(quantization.get("weight_block_size", (128, 128)))
        self.out: dict[str, torch.Tensor] = {}

    def tensors(self, mtp: int) -> dict[str, torch.Tensor]:
        config = self.config
        hidden = config["hidden_size"]
        # Gains keep the residual stream, the router and the logits spread out: no ties, no flat softmax.
        self.out["model.embed_tokens.weight"] = self._normal(config["vocab_size"], hidden).bfloat16()
        self.out["lm_head.weight"] = (self._matrix(config["vocab_size"], hidden) * 3).bfloat16()
        self._norm("model.norm.weight")
        for layer in range(config["num_hidden_layers"]):
            self._layer(layer)
        for k in range(mtp):
            self._mtp_block(f"model.mtp.layers.{k}")
        return self.out

    def _layer(self, layer: int) -> None:
        config, prefix = self.config, f"model.layers.{layer}"
        self._norm(f"{prefix}.input_layernorm.weight")
        self._norm(f"{prefix}.post_attention_layernorm.weight")
        self._attention(f"{prefix}.self_attn", window=bool(config["hybrid_layer_pattern"][layer]))
        if not config["moe_layer_freq"][layer]:
            self._mlp(f"{prefix}.mlp", config["intermediate_size"])
            return
        n_experts, hidden = config["n_routed_experts"], config["hidden_size"]
        router = self._matrix(n_experts, hidden) * 2
        bf16_router = config.get("moe_router_dtype") == "bfloat16"
        self.out[f"{prefix}.mlp.gate.weight"] = router.bfloat16() if bf16_router else router
        self.out[f"{prefix}.mlp.gate.e_score_correction_bias"] = self._normal(n_experts) * 0.1
        for expert in range(n_experts):
            self._mlp(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"], routed=True)

    def _mtp_block(self, prefix: str) -> None:
        hidden = self.config["hidden_size"]
        for name in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            self._norm(f"{prefix}.{name}.weight")
        self.out[f"{prefix}.eh_proj.weight"] = self._matrix(hidden, 2 * hidden).bfloat16()
        self._attention(f"{prefix}.self_attn", window=True)
        self._mlp(f"{prefix}.mlp", self.config["intermediate_size"])

    def _attention(self, prefix: str, *, window: bool) -> None:
        config, swa = self.config, "swa_" if window else ""
        heads, kv = config[f"{swa}num_attention_heads"], config[f"{swa}num_key_value_heads"]
        dk, dv = config[f"{swa}head_dim"], config[f"{swa}v_head_dim"]
        hidden = config["hidden_size"]
        q, k, v = (self._matrix(rows, hidden) for rows in (heads * dk, kv * dk, kv * dv))
        shards = config["num_key_value_heads"]
        if self.layout.startswith("fused"):
            self._store_fused(f"{prefix}.qkv_proj", q, k, v, shards)
        else:
            self._store_split(prefix, q, k, v, shards)
        self.out[f"{prefix}.o_proj.weight"] = self._matrix(hidden, heads * dv).bfloat16()
        if window:
            self.out[f"{prefix}.attention_sink_bias"] = self._normal(heads).bfloat16()

    def _store_fused(self, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shards: int) -> None:
        """Tensor-parallel shards [Q_r | K_r | V_r] one below the other; the scale grid restarts in each."""
        pieces = zip(q.chunk(shards), k.chunk(shards), v.chunk(shards), strict=True)
        stored = [self._fp8(torch.cat(piece)) for piece in pieces]
        self.out[f"{name}.weight"] = torch.cat([codes for codes, _ in stored])
        self.out[f"{name}.weight_scale_inv"] = torch.cat([scales for _, scales in stored])

    def _store_split(
        self, prefix: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shards: int
    ) -> None:
        k_rows, block = len(k) // shards, self.block[0]
        k_blocks = -(-k_rows // block)
        whole_blocks = shards * k_blocks == -(-len(k) // block)
        if self.layout == "split-bf16" or whole_blocks or not self.joint_kv:
            for name, weight in (("q", q), ("k", k), ("v", v)):
                self._store(f"{prefix}.{name}_proj", weight)
            return
        # V2-Flash: K and V of one shard were quantised as one matrix [K_r | V_r], then split. In a global
        # layer a shard has one KV head; in a window layer it has whole blocks, which gives a plain grid.
        self._store(f"{prefix}.q_proj", q)
        joint = [self._fp8(torch.cat(pair)) for pair in zip(k.chunk(shards), v.chunk(shards), strict=True)]
        self.out[f"{prefix}.k_proj.weight"] = torch.cat([codes[:k_rows] for codes, _ in joint])
        self.out[f"{prefix}.v_proj.weight"] = torch.cat([codes[k_rows:] for codes, _ in joint])
        self.out[f"{prefix}.k_proj.weight_scale_inv"] = torch.cat([scales[:k_blocks] for _, scales in joint])
        self.out[f"{prefix}.v_proj.weight_scale_inv"] = torch.cat([scales[k_blocks:] for _, scales in joint])

    def _mlp(self, prefix: str, inner: int, *, routed: bool = False) -> None:
        hidden = self.config["hidden_size"]
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            weight = self._matrix(*shape)
            if routed and self.layout == "fused-mxfp4":
                codes, scales = _to_mxfp4(weight)
                self.out[f"{prefix}.{name}_proj.weight"] = codes
                self.out[f"{prefix}.{name}_proj.weight_scale"] = scales
            else:
                self._store(f"{prefix}.{name}_proj", weight)

    def _store(self, name: str, weight: torch.Tensor) -> None:
        if self.layout == "split-bf16":
            self.out[f"{name}.weight"] = weight.bfloat16()
            return
        self.out[f"{name}.weight"], self.out[f"{name}.weight_scale_inv"] = self._fp8(weight)

    def _fp8(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block-quantise to e4m3 with the largest magnitude of each block at 448."""
        rows, cols = self.block
        scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // cols))
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                here = (slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols))
                scales[i, j] = weight[here].abs().max() / 448
                codes[here] = (weight[here] / scales[i, j]).to(torch.float8_e4m3fn)
        return codes, scales

    def _norm(self, name: str) -> None:
        self.out[name] = (1 + 0.1 * self._normal(self.config["hidden_size"])).bfloat16()

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def _matrix(self, rows: int, cols: int) -> torch.Tensor:
        """Rows of uneven size, so that a value read with a neighbour's scale is plainly wrong."""
        uneven = torch.exp(0.5 * self._normal(rows, 1))
        return self._normal(rows, cols) * uneven * (1.2 / cols**0.5)


def _to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two codes a byte, even column in the low nibble; one power of two per 32 columns."""
    rows, cols = weight.shape
    if cols % 32:
        raise ValueError(f"mxfp4 needs a multiple of 32 columns, not {cols}")
    blocks = weight.reshape(rows, cols // 32, 32)
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    scaled = blocks / torch.exp2(exponent)[..., None]
    nearest = (scaled.abs()[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8).reshape(rows, cols)
    return codes[:, 0::2] | codes[:, 1::2] << 4, (exponent + 127).to(torch.uint8)


# The second reading --------------------------------------------------------------------------------


def oracle_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor under its canonical name, float32, by the slowest and plainest reading of the layout."""
    return _Oracle(Path(folder)).weights()


class _Oracle:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.stored: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as shard:
                self.stored.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
        self.fused = self.config.get("attention_projection_layout") == "fused_qkv"

    def weights(self) -> dict[str, torch.Tensor]:
        out = {
            "embed": self._plain("model.embed_tokens"),
            "head": self._plain("lm_head"),
            "norm": self._plain("model.norm"),
        }
        for layer in range(self.config["num_hidden_layers"]):
            out |= self._layer(layer)
        k = 0
        while f"model.mtp.layers.{k}.enorm.weight" in self.stored:
            out |= self._mtp_block(k)
            k += 1
        return out

    def _layer(self, layer: int) -> dict[str, torch.Tensor]:
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        window = self.config["hybrid_layer_pattern"][layer] == 1
        out = {
            f"{ours}.attn_norm": self._plain(f"{theirs}.input_layernorm"),
            f"{ours}.mlp_norm": self._plain(f"{theirs}.post_attention_layernorm"),
            **self._attention(f"{theirs}.self_attn", f"{ours}.attn", window),
        }
        if self.config["moe_layer_freq"][layer] == 0:
            return out | self._mlp(f"{theirs}.mlp", f"{ours}.mlp")
        out[f"{ours}.router.weight"] = self._plain(f"{theirs}.mlp.gate")
        out[f"{ours}.router.bias"] = self.stored[f"{theirs}.mlp.gate.e_score_correction_bias"].float()
        for e in range(self.config["n_routed_experts"]):
            out |= self._mlp(f"{theirs}.mlp.experts.{e}", f"{ours}.experts.{e}")
        return out

    def _mtp_block(self, k: int) -> dict[str, torch.Tensor]:
        theirs, ours = f"model.mtp.layers.{k}", f"mtp.{k}"
        return {
            f"{ours}.embed_norm": self._plain(f"{theirs}.enorm"),
            f"{ours}.hidden_norm": self._plain(f"{theirs}.hnorm"),
            f"{ours}.attn_norm": self._plain(f"{theirs}.input_layernorm"),
            f"{ours}.mlp_norm": self._plain(f"{theirs}.pre_mlp_layernorm"),
            f"{ours}.final_norm": self._plain(f"{theirs}.final_layernorm"),
            f"{ours}.proj": self._plain(f"{theirs}.eh_proj"),
            **self._attention(f"{theirs}.self_attn", f"{ours}.attn", True),
            **self._mlp(f"{theirs}.mlp", f"{ours}.mlp"),
        }

    def _attention(self, theirs: str, ours: str, window: bool) -> dict[str, torch.Tensor]:
        out = {f"{ours}.o": self._plain(f"{theirs}.o_proj")}
        out[f"{ours}.qkv"] = (
            self._fused_qkv(theirs, window) if self.fused else self._split_qkv(theirs, window)
        )
        if f"{theirs}.attention_sink_bias" in self.stored:
            out[f"{ours}.sink"] = self.stored[f"{theirs}.attention_sink_bias"].float()
        return out

    def _split_qkv(self, theirs: str, window: bool) -> torch.Tensor:
        q = self._plain(f"{theirs}.q_proj")
        if f"{theirs}.k_proj.weight_scale_inv" not in self.stored:
            return torch.cat([q, self._plain(f"{theirs}.k_proj"), self._plain(f"{theirs}.v_proj")])
        _, kv, dk, dv = self._heads(window)
        block, shards = self._block(), self.config["num_key_value_heads"]
        k_rows, v_rows = kv * dk // shards, kv * dv // shards
        k_blocks = -(-k_rows // block)
        k_scale = self.stored[f"{theirs}.k_proj.weight_scale_inv"]
        if len(k_scale) != shards * k_blocks or shards * k_blocks == -(-kv * dk // block):
            return torch.cat([q, self._plain(f"{theirs}.k_proj"), self._plain(f"{theirs}.v_proj")])
        v_scale = self.stored[f"{theirs}.v_proj.weight_scale_inv"]
        k = self.stored[f"{theirs}.k_proj.weight"].float()
        v = self.stored[f"{theirs}.v_proj.weight"].float()
        for r in range(shards):
            grid = torch.cat([k_scale.chunk(shards)[r], v_scale.chunk(shards)[r]])
            for row in range(k_rows):
                k[r * k_rows + row] *= self._spread(grid[row // block], k.shape[1])
            for row in range(v_rows):
                v[r * v_rows + row] *= self._spread(grid[(k_rows + row) // block], v.shape[1])
        return torch.cat([q, k, v])

    def _fused_qkv(self, theirs: str, window: bool) -> torch.Tensor:
        heads, kv, dk, dv = self._heads(window)
        shards = self.config["num_key_value_heads"]
        weight = self.stored[f"{theirs}.qkv_proj.weight"].float()
        scale = self.stored.get(f"{theirs}.qkv_proj.weight_scale_inv")
        n_q, n_k, n_v = heads // shards * dk, kv // shards * dk, kv // shards * dv
        n_rows = n_q + n_k + n_v
        qs, ks, vs = [], [], []
        for shard in range(shards):
            part = weight[shard * n_rows : (shard + 1) * n_rows].clone()
            if scale is not None:
                per_shard = -(-n_rows // self._block())
                grid = scale[shard * per_shard : (shard + 1) * per_shard]
                for row in range(n_rows):
                    part[row] *= self._spread(grid[row // self._block()], part.shape[1])
            qs.append(part[:n_q])
            ks.append(part[n_q : n_q + n_k])
            vs.append(part[n_q + n_k :])
        return torch.cat(qs + ks + vs)

    def _mlp(self, theirs: str, ours: str) -> dict[str, torch.Tensor]:
        return {f"{ours}.{part}": self._plain(f"{theirs}.{part}_proj") for part in ("gate", "up", "down")}

    def _plain(self, name: str) -> torch.Tensor:
        weight = self.stored[f"{name}.weight"]
        if f"{name}.weight_scale" in self.stored:
            return self._mxfp4(weight, self.stored[f"{name}.weight_scale"])
        scale = self.stored.get(f"{name}.weight_scale_inv")
        weight = weight.float()
        if scale is None:
            return weight
        for row in range(len(weight)):
            weight[row] *= self._spread(scale[row // self._block()], weight.shape[1])
        return weight

    def _mxfp4(self, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        lut = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)])
        out = torch.empty(packed.shape[0], packed.shape[1] * 2)
        out[:, 0::2] = lut[(packed & 15).long()]
        out[:, 1::2] = lut[(packed >> 4).long()]
        for block in range(scale.shape[1]):
            out[:, block * 32 : (block + 1) * 32] *= (
                2.0 ** (scale[:, block : block + 1].double() - 127).float()
            )
        return out

    def _spread(self, scales: torch.Tensor, n: int) -> torch.Tensor:
        """One scale per column block -> one per column."""
        return scales[torch.arange(n) // self._block()]

    def _block(self) -> int:
        return self.config["quantization_config"]["weight_block_size"][0]

    def _heads(self, window: bool) -> tuple[int, int, int, int]:
        c, swa = self.config, "swa_" if window else ""
        heads, kv = c[f"{swa}num_attention_heads"], c[f"{swa}num_key_value_heads"]
        return heads, kv, c[f"{swa}head_dim"], c[f"{swa}v_head_dim"]
