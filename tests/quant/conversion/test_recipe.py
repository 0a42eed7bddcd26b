"""Recipes resolve to listings whose bytes are those of the files; requests that make no sense are refused."""

import json
from pathlib import Path

import pytest

from quant import Recipe, Source, convert
from quant.conversion.listing import make_listing, size_text
from quant.errors import BadRecipe
from tests import tiny

ROUTER_AND_VECTORS = ("embed", "norm", "router", "sink")


def source_of(tmp_path: Path, layout: str = "split-bf16", **shape: object) -> Source:
    return Source.open(tiny.make_checkpoint(tmp_path / "hf", layout=layout, **shape))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize(
    ("experts", "dense"), [("nf4", "int8"), ("nf4-16", "nf4"), ("fp8", "fp8"), ("keep", "keep")]
)
def test_listing_prices_the_pack_to_the_byte(tmp_path: Path, layout: str, experts: str, dense: str) -> None:
    source = source_of(tmp_path, layout)
    listing = make_listing(source, Recipe(experts, dense))
    for _ in convert(tmp_path / "hf", tmp_path / "pack", experts=experts, dense=dense):
        pass
    files = {file.name: file.stat().st_size for file in (tmp_path / "pack").glob("*.safetensors")}
    assert files == {file.name: file.shard.n_bytes for file in listing.files}
    assert sum(files.values()) == listing.total_bytes
    assert {entry.name for entry in listing.entries} == source.tensors.keys()


def test_defaults(tmp_path: Path) -> None:
    codecs = {entry.name: entry.codec for entry in make_listing(source_of(tmp_path), Recipe()).entries}
    assert codecs["layers.1.experts.0.gate"] == "nf4"
    assert (
        codecs["layers.1.attn.qkv"]
        == codecs["head"]
        == codecs["mtp.0.proj"]
        == codecs["mtp.0.mlp.up"]
        == "int8"
    )
    assert codecs["embed"] == codecs["layers.0.attn_norm"] == codecs["layers.1.attn.sink"] == "bf16"
    assert codecs["layers.1.router.weight"] == codecs["layers.1.router.bias"] == "f32"


def test_drafts_never_fall_below_eight_bits(tmp_path: Path) -> None:
    codecs = {e.name: e.codec for e in make_listing(source_of(tmp_path), Recipe("nf4", "nf4")).entries}
    assert codecs["layers.0.mlp.gate"] == "nf4"
    assert codecs["mtp.0.mlp.gate"] == codecs["mtp.2.attn.qkv"] == "int8"


def test_mxfp4_experts_are_not_rounded_again(tmp_path: Path) -> None:
    listing = make_listing(source_of(tmp_path, "fused-mxfp4"), Recipe("nf4"))
    assert listing.recipe.experts == "mxfp4"
    assert "keep their values exactly" in listing.notes[0]
    assert make_listing(source_of(tmp_path, "fused-mxfp4"), Recipe("int8")).recipe.experts == "int8"


def test_keep_changes_as_little_as_possible(tmp_path: Path) -> None:
    source = source_of(tmp_path, "fused-fp8", quantization_config={"weight_block_size": [128, 128]})
    codecs = {entry.name: entry.codec for entry in make_listing(source, Recipe("keep", "keep")).entries}
    assert codecs["layers.1.experts.0.gate"] == codecs["layers.0.mlp.down"] == "fp8"
    assert codecs["layers.1.attn.o"] == "bf16"
    assert codecs["layers.0.attn.qkv"] == "bf16"  # its scale grid restarts in every shard: no codec has that


def test_rules(tmp_path: Path) -> None:
    recipe = Recipe(
        "nf4",
        "int8",
        rules=(
            ("layers.*.attn.o", "bf16"),
            ("head", "keep"),
            ("layers.*.attn.*", "nf4"),
            ("layers.*.mlp.*", "nf4"),
        ),
    )
    codecs = {entry.name: entry.codec for entry in make_listing(source_of(tmp_path), recipe).entries}
    assert codecs["layers.1.attn.o"] == codecs["head"] == "bf16"
    assert codecs["layers.1.attn.qkv"] == codecs["layers.0.mlp.up"] == "nf4"
    assert codecs["layers.1.attn_norm"] == "bf16" and codecs["mtp.0.mlp.up"] == "int8"
    assert Recipe().keeping("head").rules == (("head", "keep"),)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((("layers.99.*", "nf4"),), "layers.99.*' matches no tensor"),
        ((("embed", "nf4"),), "embed can only be bf16 or f32, not nf4"),
        ((("*.router.weight", "int8"),), "router.weight can only be"),
        ((("layers.*.experts.*.down", "int8"),), "An expert needs one codec.*gets nf4.*gets int8"),
    ],
)
def test_rules_that_make_no_sense(tmp_path: Path, rules: tuple, words: str) -> None:
    with pytest.raises(BadRecipe, match=words.replace("*'", "\\*'")):
        make_listing(source_of(tmp_path), Recipe(rules=rules))


def test_unknown_names() -> None:
    with pytest.raises(BadRecipe, match="no codec 'q4'"):
        Recipe(experts="q4")
    with pytest.raises(BadRecipe, match=r"no recipe 'small'\. Known recipes: nf4"):
        Recipe.preset("small")


def test_recipe_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('experts = "nf4-16"\n[rules]\n"layers.*.attn.o" = "bf16"\nhead = "keep"\n')
    recipe = Recipe.load(file)
    assert recipe == Recipe("nf4-16", "int8", (("layers.*.attn.o", "bf16"), ("head", "keep")))
    assert Recipe.of(file) == Recipe.of(str(file)) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    for text in ("experts = 4", "expert = 'nf4'", "rules = 3", "["):
        file.write_text(text)
        with pytest.raises(BadRecipe):
            Recipe.load(file)
    with pytest.raises(BadRecipe, match="can not be read"):
        Recipe.load(tmp_path / "none.toml")


def test_recipe_hash_follows_the_settings() -> None:
    assert Recipe().hash == Recipe("nf4", "int8").hash
    assert (
        len({Recipe().hash, Recipe("nf4-16").hash, Recipe(dense="bf16").hash, Recipe().keeping("head").hash})
        == 4
    )


def test_table(tmp_path: Path) -> None:
    listing = make_listing(source_of(tmp_path, "split-fp8"), Recipe())
    lines = listing.table().splitlines()
    assert lines[0].split() == ["group", "tensors", "from", "to", "size", "was"]
    assert lines[1].split() == ["experts", "96", "fp8", "nf4", "104.8", "kB", "199.7", "kB"]
    assert lines[-1].split()[:2] == ["total", "169"]
    assert len({len(line.split("   ")[0]) > 0 for line in lines}) == 1
    facts = json.loads(json.dumps(listing.as_dict()))
    assert facts["total_bytes"] == listing.total_bytes
    assert sum(group["n_tensors"] for group in facts["groups"]) == 169


@pytest.mark.parametrize(
    ("n", "text"), [(170_300_000_000, "170.3 GB"), (1500, "1.5 kB"), (2e6, "2.0 MB"), (7, "7 B")]
)
def test_sizes_are_decimal(n: int, text: str) -> None:
    assert size_text(n) == text


def test_dense_shards_stay_below_a_gibibyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.conversion.listing.DENSE_SHARD", 50_000)
    listing = make_listing(source_of(tmp_path), Recipe())
    dense = [file for file in listing.files if file.layer is None]
    assert len(dense) > 3
    assert [file.name for file in dense[:2]] == ["dense-00001.safetensors", "dense-00002.safetensors"]
    assert all(sum(e.nbytes for e in file.entries) <= 50_000 or len(file.entries) == 1 for file in dense)


def test_a_model_without_experts(tmp_path: Path) -> None:
    source = source_of(tmp_path, moe_layer_freq=[0] * 5, mtp=0)
    listing = make_listing(source, Recipe())
    assert listing.page is None and all(file.layer is None for file in listing.files)
    assert [step.note for step in convert(tmp_path / "hf", tmp_path / "pack")][-1] == ""
