"""Export of trained parameters as a checkpoint folder in the released layout of MiMo-V2-Flash.

FP8 e4m3 in blocks of 128 x 128 with `weight_scale_inv` in float32, split q/k/v on the plain row // 128 grid,
one tensor per expert, bfloat16 for embeddings, head, o_proj, eh_proj, norms and sinks, float32 for the
router. Knows names, dtypes and files; it must not know how the parameters were trained.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .network import Params, Shape

BLOCK = 128
E4M3_MAX = 448.0
TEMPLATE = Path(__file__).resolve().parents[2] / "localmimo" / "chat" / "templates" / "mimo-v2-flash.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Stored:
    """One canonical matrix or vector: its released name and how it is stored (fp8, bf16 or f32)."""

    name: str
    dtype: str
    value: Tensor


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [rows, cols] -> e4m3 of that shape, and float32 factors [ceil(rows / 128), ceil(cols / 128)]."""
    rows, cols = weight.shape
    grid = -(-rows // BLOCK), -(-cols // BLOCK)
    padded = torch.zeros(grid[0] * BLOCK, grid[1] * BLOCK)
    padded[:rows, :cols] = weight
    blocks = padded.view(grid[0], BLOCK, grid[1], BLOCK)
    scale = (blocks.abs().amax((1, 3)) / E4M3_MAX).clamp_min(1e-12)
    codes = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :cols]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def from_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of an FP8 matrix on the plain grid."""
    wide = scale.repeat_interleave(BLOCK, 0)[: codes.shape[0]].repeat_interleave(BLOCK, 1)[
        :, : codes.shape[1]
    ]
    return codes.float() * wide


def listing(shape: Shape, p: Params, biases: dict[str, Tensor]) -> list[Stored]:
    """Every tensor of the released layout, main model first."""
    out = [
        Stored("model.embed_tokens.weight", "bf16", p["embed"]),
        Stored("lm_head.weight", "bf16", p["head"]),
        Stored("model.norm.weight", "bf16", p["norm"]),
    ]
    for n in range(shape.n_layers):
        trained, released = f"layers.{n}", f"model.layers.{n}"
        out += _attention(p, trained, released)
        out.append(Stored(f"{released}.post_attention_layernorm.weight", "bf16", p[f"{trained}.mlp_norm"]))
        out += _mlp(p, trained, released) if n == 0 else _experts(shape, p, biases, trained, released)
    for k in range(shape.n_mtp):
        trained, released = f"mtp.{k}", f"model.mtp.layers.{k}"
        names = (
            ("embed_norm", "enorm"),
            ("hidden_norm", "hnorm"),
            ("mlp_norm", "pre_mlp_layernorm"),
            ("final_norm", "final_layernorm"),
        )
        out += [Stored(f"{released}.{b}.weight", "bf16", p[f"{trained}.{a}"]) for a, b in names]
        out.append(Stored(f"{released}.eh_proj.weight", "bf16", p[f"{trained}.proj"]))
        out += _attention(p, trained, released) + _mlp(p, trained, released)
    return out


def _attention(p: Params, trained: str, released: str) -> list[Stored]:
    out = [Stored(f"{released}.input_layernorm.weight", "bf16", p[f"{trained}.attn_norm"])]
    out += [Stored(f"{released}.self_attn.{x}_proj.weight", "fp8", p[f"{trained}.attn.{x}"]) for x in "qkv"]
    out.append(Stored(f"{released}.self_attn.o_proj.weight", "bf16", p[f"{trained}.attn.o"]))
    if f"{trained}.attn.sink" in p:
        out.append(Stored(f"{released}.self_attn.attention_sink_bias", "bf16", p[f"{trained}.attn.sink"]))
    return out


def _mlp(p: Params, trained: str, released: str) -> list[Stored]:
    gate, up = p[f"{trained}.mlp.gate_up"].chunk(2)
    parts = (("gate", gate), ("up", up), ("down", p[f"{trained}.mlp.down"]))
    return [Stored(f"{released}.mlp.{name}_proj.weight", "fp8", value) for name, value in parts]


def _experts(shape: Shape, p: Params, biases: dict[str, Tensor], trained: str, released: str) -> list[Stored]:
    out = [
        Stored(f"{released}.mlp.gate.weight", "f32", p[f"{trained}.router.weight"]),
        Stored(f"{released}.mlp.gate.e_score_correction_bias", "f32", biases[f"{trained}.router.bias"]),
    ]
    for e in range(shape.n_experts):
        gate, up = p[f"{trained}.experts.gate_up"][e].chunk(2)
        parts = (("gate", gate), ("up", up), ("down", p[f"{trained}.experts.down"][e]))
        out += [
            Stored(f"{released}.mlp.experts.{e}.{name}_proj.weight", "fp8", value) for name, value in parts
        ]
    return out


def stored_tensors(entry: Stored) -> dict[str, Tensor]:
    """The tensors of the file for one entry."""
    match entry.dtype:
        case "fp8":
            codes, scale = to_fp8(entry.value.float())
            return {entry.name: codes, f"{entry.name}_scale_inv": scale}
        case "bf16":
            return {entry.name: entry.value.to(torch.bfloat16).contiguous()}
        case _:
            return {entry.name: entry.value.float().contiguous()}


def config(shape: Shape, eos: int, pad: int, context: int = 4096) -> dict[str, Any]:
    """config.json with the keys of the released V2-Flash."""
    ignored = [f"model.layers.{n}.self_attn.o_proj" for n in range(shape.n_layers)] + [
        "model.decoder.self_attn.o_proj"
    ]
    return {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.n_layers,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "initializer_range": 0.02,
        "layernorm_epsilon": shape.eps,
        "max_position_embeddings": context,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.global_kv,
        "head_dim": shape.head_dim,
        "v_head_dim": shape.v_head_dim,
        "swa_num_attention_heads": shape.heads,
        "swa_num_key_value_heads": shape.window_kv,
        "swa_head_dim": shape.head_dim,
        "swa_v_head_dim": shape.v_head_dim,
        "partial_rotary_factor": shape.rotary_factor,
        "rope_theta": shape.global_theta,
        "swa_rope_theta": shape.window_theta,
        "attention_value_scale": shape.value_scale,
        "sliding_window": shape.window,
        "sliding_window_size": shape.window,
        "attention_chunk_size": shape.window,
        "hybrid_block_size": None,
        "hybrid_layer_pattern": [0 if n in shape.global_layers else 1 for n in range(shape.n_layers)],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "intermediate_size": shape.dense_inner,
        "moe_intermediate_size": shape.expert_inner,
        "moe_layer_freq": [0] + [1] * (shape.n_layers - 1),
        "n_routed_experts": shape.n_experts,
        "n_shared_experts": None,
        "num_experts_per_tok": shape.top_k,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "ignored_layers": ignored,
            "packed_modules_mapping": {},
        },
    }


def export(shape: Shape, p: Params, biases: dict[str, Tensor], tokenizer: Path, out: Path) -> None:
    """Write the checkpoint folder; `tokenizer`: the folder with tokenizer.json and its config."""
    from tokenizers import Tokenizer

    out.mkdir(parents=True, exist_ok=True)
    entries = listing(shape, p, biases)
    main = [e for e in entries if ".mtp." not in e.name]
    half = len(main) // 2
    shards = {
        "model-00001-of-00002.safetensors": main[:half],
        "model-00002-of-00002.safetensors": main[half:],
        "model_mtp.safetensors": [e for e in entries if ".mtp." in e.name],
    }
    where, total = {}, 0
    for file, part in shards.items():
        tensors: dict[str, Tensor] = {}
        for entry in part:
            tensors |= stored_tensors(entry)
        save_file(tensors, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)
        where |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    _json(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
    )
    ids = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    eos, pad = ids.token_to_id("<|im_end|>"), ids.token_to_id("<|endoftext|>")
    _json(out / "config.json", config(shape, eos, pad))
    _json(
        out / "generation_config.json",
        {
            "bos_token_id": None,
            "do_sample": True,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "temperature": 0.3,
            "top_p": 0.95,
        },
    )
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, out / name)
    shutil.copyfile(TEMPLATE, out / "chat_template.jinja")


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export_run(run: Path, out: Path) -> None:
    """Export the weights that train_mini saved in `run`."""
    saved = torch.load(run / "weights.pt")
    export(Shape(), saved["params"], saved["biases"], run / "data", out)
    print(f"exported step {saved['meta']['step']} to {out}", flush=True)


def load_exported(shape: Shape, folder: Path) -> tuple[Params, dict[str, Tensor]]:
    """The parameters as the checkpoint holds them, dequantised to float32: what an evaluation must use."""
    raw: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as f:
            raw |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118

    def value(name: str) -> Tensor:
        scale = raw.get(f"{name}_scale_inv")
        return raw[name].float() if scale is None else from_fp8(raw[name], scale)

    from .network import init_biases, init_params

    params, biases = init_params(shape), init_biases(shape)
    for entry in listing(shape, params, biases):
        entry.value.copy_(value(entry.name))  # the entry's value is the parameter itself or a view of it
    return params, biases


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
