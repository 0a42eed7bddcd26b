"""The published sizes: headers of whole checkpoints in sparse files, held against the figures known of the
models.

No weight exists here; 960 GB of holes take a few megabytes of disk. That every tensor is found, and that the
sums agree with the published totals to the last element, shows that names and shapes were read right.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest

from quant import Recipe, Source
from quant.checkpoint.published import published_tensors
from quant.conversion.listing import make_listing
from quant.formats.codec import ceil_div
from tests.tiny import make_config

WIDTH = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
Tensors = Iterator[tuple[str, str, tuple[int, ...]]]


@dataclass(frozen=True)
class Model:
    hidden: int
    n_layers: int
    global_layers: tuple[int, ...]
    heads: int
    kv: int
    n_experts: int
    layout: str
    elements: int | None  # of all tensors, scales included

    def config(self) -> dict:
        pattern = [int(layer not in self.global_layers) for layer in range(self.n_layers)]
        config = make_config(
            self.layout,
            hidden_size=self.hidden,
            num_hidden_layers=self.n_layers,
            hybrid_layer_pattern=pattern,
            num_attention_heads=self.heads,
            swa_num_attention_heads=self.heads,
            num_key_value_heads=self.kv,
            swa_num_key_value_heads=8,
            n_routed_experts=self.n_experts,
            num_experts_per_tok=8,
            intermediate_size=16384,
            moe_intermediate_size=2048,
            vocab_size=152576,
            **{
                f"{swa}{key}": dim
                for swa in ("", "swa_")
                for key, dim in (("head_dim", 192), ("v_head_dim", 128))
            },
        )
        config["quantization_config"]["weight_block_size"] = [128, 128]
        return config

    def tensors(self) -> Tensors:
        yield "model.embed_tokens.weight", "BF16", (152576, self.hidden)
        yield "lm_head.weight", "BF16", (152576, self.hidden)
        yield "model.norm.weight", "BF16", (self.hidden,)
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", "BF16", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", "BF16", (self.hidden,)
            yield from self.attention(f"{prefix}.self_attn", layer not in self.global_layers)
            if layer == 0:
                yield from self.mlp(f"{prefix}.mlp", 16384)
                continue
            yield f"{prefix}.mlp.gate.weight", "F32", (self.n_experts, self.hidden)
            yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (self.n_experts,)
            for expert in range(self.n_experts):
                yield from self.mlp(f"{prefix}.mlp.experts.{expert}", 2048, routed=True)
        for k in range(3):
            prefix = f"model.mtp.layers.{k}"
            for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
                yield f"{prefix}.{norm}.weight", "BF16", (self.hidden,)
            yield f"{prefix}.eh_proj.weight", "BF16", (self.hidden, 2 * self.hidden)
            yield from self.attention(f"{prefix}.self_attn", True)
            yield from self.mlp(f"{prefix}.mlp", 16384)

    def attention(self, prefix: str, window: bool) -> Tensors:
        kv = 8 if window else self.kv
        if self.layout == "split-fp8":
            yield from fp8(f"{prefix}.q_proj", self.heads * 192, self.hidden)
            k_scale_rows = 12 if window else 8  # facts of the published files: 4 heads x 2 in global layers
            yield from fp8(f"{prefix}.k_proj", kv * 192, self.hidden, k_scale_rows)
            yield from fp8(f"{prefix}.v_proj", kv * 128, self.hidden)
        else:
            rows = self.heads * 192 + kv * 320
            scale_rows = {(4, 4): 108, (4, 8): 116, (8, 8): 216}[self.kv, kv]
            yield from fp8(f"{prefix}.qkv_proj", rows, self.hidden, scale_rows)
        yield f"{prefix}.o_proj.weight", "BF16", (self.hidden, self.heads * 128)
        if window:
            yield f"{prefix}.attention_sink_bias", "BF16", (self.heads,)

    def mlp(self, prefix: str, inner: int, *, routed: bool = False) -> Tensors:
        for name, rows, cols in (
            ("gate", inner, self.hidden),
            ("up", inner, self.hidden),
            ("down", self.hidden, inner),
        ):
            if routed and self.layout == "fused-mxfp4":
                yield f"{prefix}.{name}_proj.weight", "U8", (rows, cols // 2)
                yield f"{prefix}.{name}_proj.weight_scale", "U8", (rows, cols // 32)
            else:
                yield from fp8(f"{prefix}.{name}_proj", rows, cols)


def fp8(name: str, rows: int, cols: int, scale_rows: int | None = None) -> Tensors:
    yield f"{name}.weight", "F8_E4M3", (rows, cols)
    yield f"{name}.weight_scale_inv", "F32", (scale_rows or ceil_div(rows, 128), cols // 128)


FLASH_GLOBAL = (0, 5, 11, 17, 23, 29, 35, 41, 47)
PRO_GLOBAL = (0, 7, 15, 23, 31, 39, 47, 55, 62, 69)
FLASH = Model(4096, 48, FLASH_GLOBAL, 64, 4, 256, "split-fp8", None)
V25 = Model(4096, 48, FLASH_GLOBAL, 64, 4, 256, "fused-fp8", None)
PRO = Model(6144, 70, PRO_GLOBAL, 128, 8, 384, "fused-fp8", 1_023_244_718_976)
V26 = Model(4096, 48, FLASH_GLOBAL, 64, 4, 256, "fused-mxfp4", None)


def write_headers(folder: Path, model: Model) -> int:
    """One file of holes per layer; returns the number of elements."""
    (folder / "config.json").write_text(json.dumps(model.config()))
    files: dict[str, dict[str, object]] = {}
    ends: dict[str, int] = {}
    elements = 0
    for name, dtype, shape in model.tensors():
        file = f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
        start = ends.get(file, 0)
        ends[file] = start + prod(shape) * WIDTH[dtype]
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, ends[file]]}
        files.setdefault(file, {})[name] = entry
        elements += prod(shape)
    for file, entries in files.items():
        header = json.dumps(entries).encode()
        with (folder / file).open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + ends[file])
    index = {name: file for file, entries in files.items() for name in entries}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return elements


@pytest.mark.parametrize("model", [FLASH, V25, PRO, V26], ids=["flash", "v2.5", "v2.5-pro", "v2.6"])
def test_two_listings_agree(model: Model) -> None:
    """What the package works out from config.json, and what this file spells out by hand."""
    config = model.config() | {"num_nextn_predict_layers": 3, "moe_router_dtype": None}
    assert sorted(published_tensors(config)) == sorted(model.tensors())


@pytest.mark.parametrize(
    ("model", "n_experts", "page_mib", "experts_gib", "parameters"),
    [
        (FLASH, 12_032, 12.75, 149.8, 309.77e9),
        pytest.param(V25, 12_032, 12.75, 149.8, 309.77e9, marks=pytest.mark.slow),
        pytest.param(PRO, 26_496, 19.125, 494.9, 1023.18e9, marks=pytest.mark.slow),
        pytest.param(V26, 12_032, 12.75, 149.8, 309.77e9, marks=pytest.mark.slow),
    ],
    ids=["flash", "v2.5", "v2.5-pro", "v2.6"],
)
def test_published_sizes(
    tmp_path: Path, model: Model, n_experts: int, page_mib: float, experts_gib: float, parameters: float
) -> None:
    elements = write_headers(tmp_path, model)
    assert model.elements in (None, elements)
    started = time.process_time()
    listing = make_listing(Source.open(tmp_path), Recipe())
    assert time.process_time() - started < 30
    assert sum(prod(entry.shape) for entry in listing.entries) == pytest.approx(parameters, rel=2e-5)
    groups = {total.group: total for total in listing.groups}
    assert groups["experts"].n_tensors == 3 * n_experts
    assert groups["experts"].nbytes / 2**30 == pytest.approx(experts_gib, abs=0.05)
    assert listing.page is not None
    # The three float32 tensor scales of an expert spill into one more sector.
    assert listing.page.bytes == page_mib * 2**20 + 4096
    assert listing.peak_ram_bytes < 1.5e9
    assert len([file for file in listing.files if file.layer is not None]) == n_experts // model.n_experts
    assert all(file.shard.n_bytes < 2**30 + 2**20 for file in listing.files[:3] if len(file.entries) > 1)
