"""Packs whose parts contradict one another: the native code never sees sizes that are not those of its buffers."""

import json
from pathlib import Path

import pytest

from localmimo import load
from localmimo.errors import BadModel, LocalMimoError
from quant.errors import QuantError
from quant.pack.pack import Pack


def set_config(folder: Path, key: str, value: object) -> None:
    """Another config.json, of the size that the manifest is made to say."""
    path, manifest = folder / "config.json", folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    facts = json.loads(manifest.read_text())
    facts["files"]["config.json"]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(facts))


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "n_routed_experts", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads", "head_dim",
    "v_head_dim", "swa_head_dim", "swa_v_head_dim",
)  # fmt: skip


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("key", SIZES)
def test_a_config_that_is_not_the_packs(nf4_pack: Path, key: str, factor: float) -> None:
    size = json.loads((nf4_pack / "config.json").read_text())[key]
    set_config(nf4_pack, key, int(size * factor))
    with (
        pytest.raises(BadModel, match=r"(its config\.json asks for|config\.json has) .*\.$"),
        load(nf4_pack, context=256, ram="256MiB", profile=None),
    ):
        pass


@pytest.mark.parametrize("n_heads", [1, 4])
def test_the_pack_says_how_many_draft_heads_there_are(nf4_pack: Path, n_heads: int) -> None:
    set_config(nf4_pack, "num_nextn_predict_layers", n_heads)
    with load(nf4_pack, context=256, ram="256MiB", profile=None) as engine:
        assert engine.generate("abc def", max_tokens=4).tokens


def test_a_layers_pages_that_are_too_few(nf4_pack: Path) -> None:
    """Routers know eight experts, one layer's file holds seven."""
    with Pack.open(nf4_pack) as pack:
        page = pack.page.bytes if pack.page else 0
    facts = json.loads((nf4_pack / "manifest.json").read_text())
    layer = facts["layers"]["1"]
    layer["crc32"].pop()
    facts["files"][layer["file"]]["bytes"] -= page
    path = nf4_pack / layer["file"]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - page)
    (nf4_pack / "manifest.json").write_text(json.dumps(facts))
    with (
        pytest.raises((LocalMimoError, QuantError)),
        load(nf4_pack, context=256, ram="256MiB", profile=None) as engine,
    ):
        for _ in engine.stream("abc def " * 9, max_tokens=4):
            pass
