"""Checkpoints: two independent readings of every layout agree, and what is wrong is said in a sentence."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quant import Source
from quant.errors import BadCheckpoint
from tests import tiny

ODD = {
    "head_dim": 20,
    "swa_head_dim": 20,
    "v_head_dim": 13,
    "swa_v_head_dim": 13,
    "vocab_size": 131,
    "num_hidden_layers": 3,
}
INDEX = "model.safetensors.index.json"


def agree(folder: Path) -> Source:
    """Hold our reading against the oracle's, whole and by rows; every layout is exact in float32."""
    source = Source.open(folder)
    expected = tiny.oracle_weights(folder)
    assert source.tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert source.tensors[name].shape == tuple(weight.shape), name
        assert torch.equal(source.read(name).float(), weight), name
        n = len(weight)
        assert torch.equal(source.rows(name, n // 3, n // 2 + 1).float(), weight[n // 3 : n // 2 + 1]), name
    return source


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_two_readings_agree(tmp_path: Path, layout: str, seed: int) -> None:
    agree(tiny.make_checkpoint(tmp_path, layout=layout, seed=seed))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_odd_sizes(tmp_path: Path, layout: str) -> None:
    hidden = 64 if layout == "fused-mxfp4" else 75
    agree(tiny.make_checkpoint(tmp_path, layout=layout, hidden_size=hidden, **ODD))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("n_shards", [1, 11])
def test_weight_and_scale_may_lie_in_different_files(tmp_path: Path, layout: str, n_shards: int) -> None:
    agree(tiny.make_checkpoint(tmp_path, layout=layout, n_shards=n_shards))


def test_joint_grid_of_keys_and_values(tmp_path: Path) -> None:
    """The global layers of V2-Flash: 2 heads x 2 scale rows of K although 48 rows make 3 blocks of 16."""
    source = agree(tiny.make_checkpoint(tmp_path, layout="split-fp8"))
    scales = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            scales |= {n: shard.get_slice(n).get_shape() for n in shard.keys() if "layers.0.self_attn" in n}  # noqa: SIM118
    assert scales["model.layers.0.self_attn.k_proj.weight_scale_inv"] == [4, 4]
    assert scales["model.layers.0.self_attn.v_proj.weight_scale_inv"] == [2, 4]
    assert len(source.matrices["layers.0.attn.qkv"].pieces) == 1 + 2 + 2 * 2
    assert len(source.matrices["layers.1.attn.qkv"].pieces) == 3


def test_reading_the_joint_grid_as_a_plain_one_would_be_wrong(tmp_path: Path) -> None:
    """The trap is real in these sizes: V differs when all its rows use V's own scales."""
    folder = tiny.make_checkpoint(tmp_path, layout="split-fp8")
    right = Source.open(folder).read("layers.0.attn.qkv")
    stored = {}
    for file in folder.glob("model-*.safetensors"):
        stored |= load_file(file)
    v = stored["model.layers.0.self_attn.v_proj.weight"].float()
    scale = stored["model.layers.0.self_attn.v_proj.weight_scale_inv"]
    wrong = v * scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    ratio = (wrong[:8] / right[-32:-24]).nan_to_num(1.0)
    assert (ratio - 1).abs().max() > 0.2


@pytest.mark.parametrize("shape", [{}, ODD, {"head_dim": 12, "v_head_dim": 8, "num_key_value_heads": 2}])
def test_plain_grids_of_keys_and_values(tmp_path: Path, shape: dict) -> None:
    source = agree(tiny.make_checkpoint(tmp_path, layout="split-fp8", joint_kv=False, **shape))
    assert len(source.matrices["layers.0.attn.qkv"].pieces) == 3


def test_a_grid_that_fits_both_readings_is_plain(tmp_path: Path) -> None:
    """Two heads of 96 rows in blocks of 128: K has two scale rows either way, V one in the plain grid."""
    shape = {
        "head_dim": 96,
        "v_head_dim": 64,
        "swa_head_dim": 96,
        "swa_v_head_dim": 64,
        "num_hidden_layers": 2,
    }
    folder = tiny.make_checkpoint(
        tmp_path,
        layout="split-fp8",
        joint_kv=False,
        quantization_config={"weight_block_size": [128, 128]},
        **shape,
    )
    source = agree(folder)
    assert len(source.matrices["layers.0.attn.qkv"].pieces) == 3


def test_the_scale_grid_restarts_in_every_fused_shard(tmp_path: Path) -> None:
    """88 rows a shard make 5.5 blocks: 12 scale rows, where one grid over 176 rows would have 11."""
    source = agree(tiny.make_checkpoint(tmp_path, layout="fused-fp8"))
    pieces = source.matrices["layers.0.attn.qkv"].pieces
    assert [piece.grid.first for piece in pieces] == [0, 6] * 3
    assert pieces[0].grid.scales.stored.shape == (12, 4)


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    tiny.make_checkpoint(tmp_path, layout="fused-fp8")
    code = (
        "import sys, quant\n"
        f"source = quant.Source.open({str(tmp_path)!r})\n"
        "source.fingerprint, source.tensors\n"
        "quant.make_listing(source, quant.Recipe()).table()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_experts_and_layers(tmp_path: Path) -> None:
    source = Source.open(tiny.make_checkpoint(tmp_path))
    assert source.experts(0) == range(0)
    assert source.experts(1) == range(8)
    assert source.geometry.moe_layers == (1, 2, 3, 4)
    assert source.n_mtp == 3
    assert source.name == tmp_path.name
    assert "layers.0.attn.sink" not in source.tensors and "layers.1.attn.sink" in source.tensors


def test_name_in_the_hub_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--XiaomiMiMo--MiMo-V2-Flash" / "snapshots" / "0123abcd"
    assert Source.open(tiny.make_checkpoint(folder)).name == "MiMo-V2-Flash"


def test_stored_dtypes(tmp_path: Path) -> None:
    source = Source.open(tiny.make_checkpoint(tmp_path, layout="fused-mxfp4"))
    kinds = {name: source.tensors[name].dtype for name in source.tensors}
    assert kinds["embed"] == kinds["layers.1.attn.o"] == kinds["layers.1.router.weight"] == "bf16"
    assert kinds["layers.1.router.bias"] == "f32"
    assert kinds["layers.1.attn.qkv"] == kinds["layers.0.mlp.gate"] == "fp8"
    assert kinds["layers.1.experts.0.gate"] == "mxfp4"
    assert source.read("embed").dtype == torch.bfloat16
    assert source.read("layers.1.attn.qkv").dtype == torch.float32


def test_bytes_add_up_to_the_files(tmp_path: Path) -> None:
    for layout in tiny.LAYOUTS:
        folder = tiny.make_checkpoint(tmp_path / layout, layout=layout)
        source = Source.open(folder)
        total = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
        # The scale row that K shares with V is counted with the one matrix that holds both.
        assert sum(info.nbytes for info in source.tensors.values()) == total


def test_fingerprint(tmp_path: Path) -> None:
    first = Source.open(tiny.make_checkpoint(tmp_path / "a")).fingerprint
    assert Source.open(tiny.make_checkpoint(tmp_path / "b")).fingerprint == first
    assert Source.open(tiny.make_checkpoint(tmp_path / "c", vocab_size=161)).fingerprint != first
    assert Source.open(tiny.make_checkpoint(tmp_path / "d", rope_theta=1)).fingerprint != first


def test_towers_are_skipped_and_counted(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path)
    names = ["visual.blocks.0.w", "visual.blocks.1.w", "audio_encoder.x", "speech_embeddings.3.weight"]
    edit_shard(folder, lambda tensors: tensors.update({name: torch.zeros(2) for name in names}))
    assert agree(folder).skipped == {"audio_encoder.": 1, "speech_embeddings": 1, "visual.": 2}


def test_single_file(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")
    agree(folder)


def test_mtp_file_that_the_index_forgot(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path)
    edit_index(folder, lambda index: {n: f for n, f in index.items() if not n.startswith("model.mtp.")})
    assert agree(folder).n_mtp == 3


# What can be wrong


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_index(folder: Path, change: Callable[[dict], dict]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_shard(folder: Path, change: Callable[[dict], None], containing: str = "model.norm.weight") -> None:
    """Rewrite the file that holds a tensor."""
    file = json.loads((folder / INDEX).read_text())["weight_map"][containing]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(BadCheckpoint, match=words):
        Source.open(folder)


def test_no_folder_no_config_no_index(tmp_path: Path) -> None:
    refused(tmp_path / "none", "not a folder")
    refused(tmp_path, "no config.json")
    folder = tiny.make_checkpoint(tmp_path)
    (folder / INDEX).unlink()
    refused(folder, "neither model.safetensors.index.json nor model.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "not a MiMo-V2 model"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern has 2 entries for 5 layers"),
        ({"hybrid_layer_pattern": [0, 1, 2, 0, 1]}, "list of 0 and 1"),
        ({"moe_layer_freq": 1}, "moe_layer_freq must be a list"),
        ({"attention_projection_layout": "striped"}, "'striped', not split or fused_qkv"),
        ({"attention_projection_layout": "fused_qkv"}, "no tensor model.layers.0.self_attn.qkv_proj.weight"),
        ({"num_key_value_heads": 3}, "4 query heads do not divide by 3"),
        ({"hidden_size": 48}, r"has shape \[160, 64\], but config.json implies \[160, 48\]"),
        ({"n_routed_experts": 9}, r"no tensor .*experts.8|gate.weight .*shape \[8, 64\]"),
        (
            {"num_hidden_layers": 4, "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1]},
            "tensors that",
        ),
        ({"num_nextn_predict_layers": 2}, "promises 2 MTP blocks, but the checkpoint holds 3"),
        ({"quantization_config": {"weight_block_size": [0, 16]}}, "weight_block_size"),
    ],
)
def test_contradictions_with_the_config(tmp_path: Path, changes: dict, words: str) -> None:
    folder = tiny.make_checkpoint(tmp_path)
    edit_config(folder, **changes)
    refused(folder, words)


def test_config_that_is_no_json(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path)
    for text in ("{", "[]", '"x"'):
        (folder / "config.json").write_text(text)
        refused(folder, "config.json is not")


def test_missing_shard_is_named_with_its_count(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    file = "model-00002-of-00003.safetensors"
    count = sum(f == file for f in weight_map.values())
    (folder / file).unlink()
    refused(folder, f"lacks {file} with {count} tensors; 3 of 4 files are there")


def test_truncated_shard(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path)
    file = folder / "model-00002-of-00003.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 1)
    refused(folder, f"{file.name} is cut off: its header describes {size:,} bytes, it has {size - 1:,}")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", "", 3]
)
def test_index_may_not_leave_the_folder(tmp_path: Path, name: object) -> None:
    folder = tiny.make_checkpoint(tmp_path)
    edit_index(folder, lambda index: index | {"model.norm.weight": name})
    refused(folder, "no safetensors file of the folder")


def test_index_that_lies(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path)
    edit_index(folder, lambda index: index | {"model.norm.weight": "model_mtp.safetensors"})
    refused(folder, "model.norm.weight into model_mtp.safetensors, which does not contain it")
    (folder / INDEX).write_text('{"weight_map": {}}')
    refused(folder, "no weight_map")


def test_tensor_missing_twice_or_unknown(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "a")
    edit_shard(folder, lambda tensors: tensors.update({"model.surprise.weight": torch.zeros(2)}))
    refused(folder, "1 tensors that config.json does not imply: model.surprise.weight")
    folder = tiny.make_checkpoint(tmp_path / "b")
    edit_shard(
        folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64)}), "lm_head.weight"
    )
    refused(folder, "model.norm.weight is stored twice")
    folder = tiny.make_checkpoint(tmp_path / "c")
    edit_shard(folder, lambda tensors: tensors.pop("model.norm.weight"))
    edit_index(folder, lambda index: {n: f for n, f in index.items() if n != "model.norm.weight"})
    refused(folder, "no tensor model.norm.weight, which config.json implies")


K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def test_wrong_dtypes_and_scales(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "a", layout="split-fp8")
    edit_shard(folder, lambda tensors: tensors.pop(K_PROJ + "_scale_inv"), K_PROJ + "_scale_inv")
    edit_index(folder, lambda index: {n: f for n, f in index.items() if n != K_PROJ + "_scale_inv"})
    refused(folder, f"no tensor {K_PROJ}_scale_inv")
    folder = tiny.make_checkpoint(tmp_path / "b", layout="split-fp8")
    edit_shard(folder, lambda tensors: tensors.update({K_PROJ: torch.zeros(48, 64)}), K_PROJ)
    refused(folder, "F32, yet .*_scale_inv exists|stored as F32 and|not alike")
    folder = tiny.make_checkpoint(tmp_path / "c")
    edit_shard(
        folder, lambda tensors: tensors.update({K_PROJ: torch.zeros(48, 64, dtype=torch.int8)}), K_PROJ
    )
    refused(folder, "stored as I8; expected BF16 or F16 or F32 or F8_E4M3")
    folder = tiny.make_checkpoint(tmp_path / "d", layout="split-fp8")
    edit_shard(folder, lambda t: t.update({K_PROJ + "_scale_inv": torch.ones(5, 4)}), K_PROJ + "_scale_inv")
    refused(folder, r"shape \[5, 4\], but config.json implies \[3, 4\]")


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        ("split-bf16", "weight"),
        *((layout, what) for layout in ("split-fp8", "fused-fp8") for what in ("weight", "scale")),
        ("fused-mxfp4", "scale"),
    ],
)
def test_numbers_that_are_not_finite(tmp_path: Path, layout: str, what: str) -> None:
    folder = tiny.make_checkpoint(tmp_path, layout=layout)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    if what == "scale":
        name += {"fused-mxfp4": "_scale"}.get(layout, "_scale_inv")

    def spoil(tensors: dict) -> None:
        if layout == "fused-mxfp4":
            tensors[name][0, 0] = 255
        elif tensors[name].dtype == torch.float8_e4m3fn:
            tensors[name].view(torch.uint8)[0, 0] = 0x7F
        else:
            tensors[name][0, 0] = float("nan")

    edit_shard(folder, spoil, name)
    source = Source.open(folder)
    with pytest.raises(BadCheckpoint, match=r"experts\.3\.up_proj\.weight contains NaN or infinity"):
        source.read("layers.1.experts.3.up")
    source.read("layers.1.experts.3.gate")


@pytest.mark.parametrize(
    ("method", "says"), [("bitsandbytes", "rounded a second time"), ("awq", "quant_method is 'awq'")]
)
def test_checkpoints_that_others_quantised_are_refused_with_the_reason(
    tmp_path: Path, method: str, says: str
) -> None:
    folder = tiny.make_checkpoint(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(BadCheckpoint, match=says):
        Source.open(folder)
