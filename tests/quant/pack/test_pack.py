"""Packs: what was converted reads back, pages lie where the manifest says, damage is refused in words."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant import Pack, QTensor, Source, convert, verify
from quant.errors import BadPack
from quant.formats.page import PageLayout
from quant.pack.pack import experts_of
from quant.pack.verify import verify_steps
from tests import tiny

TOLERANCE = {
    "nf4": 0.09,
    "nf4-16": 0.085,
    "mxfp4": 0.13,
    "int8": 0.009,
    "fp8": 0.04,
    "bf16": 0.003,
    "f32": 1e-7,
}


def make(folder: Path, layout: str = "split-fp8", **recipe: str) -> Path:
    if not (folder / "hf").exists():
        tiny.make_checkpoint(folder / "hf", layout=layout)
    for _ in convert(folder / "hf", folder / "pack", **recipe):
        pass
    return folder / "pack"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def pack_folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "pack")


def page_bytes(pack: Pack, layer: int, expert: int) -> torch.Tensor:
    at = pack.page_at(layer, expert)
    fd = os.open(at.file, os.O_RDONLY)
    raw = bytearray(os.pread(fd, at.nbytes, at.offset))
    os.close(fd)
    return torch.frombuffer(raw, dtype=torch.uint8)


def weights_of(pack: Pack) -> dict[str, tuple[str, torch.Tensor]]:
    """Everything in a pack: name -> codec and values."""
    out: dict[str, tuple[str, torch.Tensor]] = {}
    for name in pack.tensors:
        tensor = pack.tensor(name)
        if isinstance(tensor, QTensor):
            out[name] = (tensor.codec, tensor.dequantize())
        else:
            out[name] = ("f32", tensor.float())
    for layer, facts in pack.manifest["layers"].items():
        for expert in range(len(facts["crc32"])):
            views = pack.page.expert(page_bytes(pack, int(layer), expert))
            for matrix in ("gate", "up", "down"):
                packed = getattr(views, matrix)
                out[f"layers.{layer}.experts.{expert}.{matrix}"] = (packed.codec, packed.dequantize())
    return out


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize(
    ("experts", "dense"), [("nf4", "int8"), ("int8", "nf4-16"), ("mxfp4", "bf16"), ("fp8", "fp8")]
)
def test_every_weight_comes_back(tmp_path: Path, layout: str, experts: str, dense: str) -> None:
    with Pack.open(make(tmp_path, layout, experts=experts, dense=dense)) as pack:
        expected = tiny.oracle_weights(tmp_path / "hf")
        found = weights_of(pack)
        assert found.keys() == expected.keys()
        for name, (codec, values) in found.items():
            error = (values - expected[name]).norm() / expected[name].norm()
            exact = codec == "mxfp4" and layout == "fused-mxfp4"
            assert error <= (0 if exact else TOLERANCE[codec]), f"{name} in {codec}: {error}"


def test_odd_sizes(tmp_path: Path) -> None:
    shape = {"hidden_size": 75, "moe_intermediate_size": 21, "intermediate_size": 50, "vocab_size": 131}
    tiny.make_checkpoint(tmp_path / "hf", layout="split-fp8", **shape)
    with Pack.open(make(tmp_path, dense="nf4")) as pack:
        expected = tiny.oracle_weights(tmp_path / "hf")
        for name, (codec, values) in weights_of(pack).items():
            assert (values - expected[name]).norm() <= TOLERANCE[codec] * 1.1 * expected[name].norm(), name


def test_experts_kept_as_fp8_are_the_stored_bytes(tmp_path: Path) -> None:
    tiny.make_checkpoint(
        tmp_path / "hf",
        layout="fused-fp8",
        quantization_config={"weight_block_size": [128, 128]},
        hidden_size=160,
    )
    with Pack.open(make(tmp_path, experts="keep", dense="keep")) as pack:
        expected = tiny.oracle_weights(tmp_path / "hf")
        for name, (codec, values) in weights_of(pack).items():
            assert codec in ("fp8", "bf16", "f32")
            if codec == "fp8":
                assert torch.equal(values, expected[name]), name


def test_pages_are_aligned_and_equal(made: Path) -> None:
    with Pack.open(made) as pack:
        assert pack.page == PageLayout("nf4", 64, 32)
        places = [pack.page_at(layer, expert) for layer in (1, 2, 3, 4) for expert in range(8)]
        assert all(at.offset % 4096 == 0 and at.nbytes == pack.page.bytes for at in places)
        assert places[1].offset == places[0].offset + pack.page.bytes
        for part in pack.page.slices:
            assert part.offset % 64 == 0
        for missing in ((0, 0), (1, 8), (1, -1), (99, 0)):
            with pytest.raises(BadPack, match="no expert"):
                pack.page_at(*missing)


def test_views_share_the_page(made: Path) -> None:
    with Pack.open(made) as pack:
        buffer = page_bytes(pack, 1, 0)
        codes = pack.page.expert(buffer).down.parts["codes"]
        assert codes.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_stock_tools_open_every_file(made: Path) -> None:
    with Pack.open(made) as pack:
        stock = {}
        for file in made.glob("*.safetensors"):
            stock |= load_file(file)
        assert torch.equal(stock["layers.1.experts.3"], page_bytes(pack, 1, 3))
        assert torch.equal(stock["head.codes"], pack.tensor("head").parts["codes"])
        assert torch.equal(stock["norm"], pack.tensor("norm"))


def test_facts_of_a_pack(made: Path) -> None:
    with Pack.open(made) as pack:
        assert pack.name == "hf" and len(pack.id) == 64
        assert pack.config == json.loads((made.parent / "hf" / "config.json").read_text())
        assert (made / "config.json").read_bytes() == (made.parent / "hf" / "config.json").read_bytes()
        assert pack.n_bytes == sum(f.stat().st_size for f in made.iterdir() if f.name != "manifest.json")
        assert pack.has("head") and not pack.has("layers.1.experts.0.gate")
        assert (
            pack.tensors["head"].shape == (160, 64)
            and pack.tensors["head"].nbytes == pack.tensor("head").nbytes
        )
        assert 0.07 < pack.manifest["error"]["experts"]["rms"] < 0.085
        with pytest.raises(BadPack, match="no tensor surprise"):
            pack.tensor("surprise")


def test_tokenizer_and_template_travel_along(tmp_path: Path) -> None:
    tiny.make_checkpoint(tmp_path / "hf")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "secrets.txt"):
        (tmp_path / "hf" / name).write_text(f"{{}} {name}")
    folder = make(tmp_path)
    assert (folder / "chat_template.jinja").read_text() == "{} chat_template.jinja"
    assert (folder / "tokenizer.json").is_file() and not (folder / "secrets.txt").exists()


def test_card(made: Path) -> None:
    card = (made / "README.md").read_text()
    assert card.startswith("# hf, packed for localmimo\n")
    assert "| experts | 96 | nf4 | 104.8 kB | 0.07" in card


# Damage


def refused(folder: Path, words: str) -> None:
    with pytest.raises(BadPack, match=words):
        Pack.open(folder)


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_no_pack(tmp_path: Path) -> None:
    refused(tmp_path, "is no pack")
    refused(tmp_path / "none", "is no pack")
    (tmp_path / "begun.partial").mkdir()
    refused(tmp_path / "begun", "run the same quantize command again")


def test_newer_version(pack_folder: Path) -> None:
    edit(pack_folder, lambda m: m.update(version=2))
    refused(pack_folder, "pack of version 2; this program reads up to 1")


def set_at(*path: object, to: object) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        here = manifest
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_at("format", to="zip"), "does not describe a localmimo-pack"),
        (set_at("version", to="1"), "impossible version"),
        (set_at("version", to=True), "impossible version"),
        (set_at("files", to=[]), "files must be an object"),
        (set_at("files", "../evil", to={"bytes": 1, "sha256": "0" * 64}), "no file of the folder"),
        (set_at("files", "config.json", "bytes", to=-1), "not a count"),
        (set_at("files", "config.json", "bytes", to=1), "config.json has .* bytes; the manifest says 1"),
        (set_at("files", "config.json", "sha256", to="x"), "no SHA-256"),
        (set_at("files", "more.bin", to={"bytes": 1, "sha256": "0" * 64}), "lacks more.bin"),
        (set_at("page", "codec", to="nf3"), "page.codec is 'nf3'"),
        (set_at("page", "hidden", to=65), "page.bytes is"),
        (set_at("page", "hidden", to=1e9), "not a count"),
        (set_at("page", "inner", to=0), "page.inner is 0"),
        (set_at("page", to=None), "no page layout"),
        (set_at("layers", "1", "data_offset", to=8), "no multiple of 4096"),
        (set_at("layers", "1", "crc32", to=[1]), "its pages end at"),
        (set_at("layers", "1", "crc32", to=[-1] * 8), "not a count"),
        (set_at("layers", "1", "file", to="config.jsonx"), "not among files"),
        (set_at("layers", "x", to={}), "no layer number"),
        (set_at("tensors", "head", "codec", to="zip"), "tensors.head.codec is 'zip'"),
        (set_at("tensors", "norm", "codec", to="nf4"), "tensors.norm.codec is 'nf4'; known are bf16, f32"),
        (set_at("tensors", "head", "shape", to=[0, 64]), "not the shape"),
        (set_at("tensors", "head", "shape", to="big"), "not the shape"),
        (set_at("tensors", "head", "file", to="/etc/passwd"), "not among files"),
        (set_at("tensors", "head", to=3), "tensors.head must be an object"),
        (set_at("source", to={}), "fingerprint must be a string"),
        (set_at("model", to={"name": 3}), "model.name must be a string"),
        (set_at("recipe_hash", to=None), "recipe_hash"),
    ],
)
def test_a_manifest_is_read_strictly(pack_folder: Path, change: Callable[[dict], None], words: str) -> None:
    edit(pack_folder, change)
    refused(pack_folder, words)


def test_a_manifest_that_is_no_json(pack_folder: Path) -> None:
    for text in ("", "{", "[]", "null", "[" * 100_000):
        (pack_folder / "manifest.json").write_text(text)
        refused(pack_folder, "not JSON|does not describe")


def test_shape_that_contradicts_the_file(pack_folder: Path) -> None:
    edit(pack_folder, set_at("tensors", "head", "shape", to=[192, 64]))
    with Pack.open(pack_folder) as pack, pytest.raises(BadPack, match=r"head.codes should be i8 \[12"):
        pack.tensor("head")


def test_a_shape_of_the_same_size_that_contradicts_the_file(tmp_path: Path) -> None:
    folder = make(tmp_path, dense="bf16")
    edit(folder, lambda m: m["tensors"]["head"]["shape"].reverse())
    with Pack.open(folder) as pack, pytest.raises(BadPack, match="head.* should be bf16"):
        pack.tensor("head")


@pytest.mark.parametrize(("layer", "expert"), [(2, -1), (2, 8), (0, 0), (99, 0)])
def test_there_is_no_such_page(made: Path, layer: int, expert: int) -> None:
    with Pack.open(made) as pack, pytest.raises(BadPack, match=f"no expert {expert} in layer {layer}"):
        pack.page_at(layer, expert)


def test_layers_are_in_their_order_whatever_the_manifest_says(pack_folder: Path) -> None:
    edit(pack_folder, lambda m: m.update(layers=dict(reversed(m["layers"].items()))))
    with Pack.open(pack_folder) as pack:
        assert list(experts_of(pack)) == sorted(experts_of(pack)) and len(experts_of(pack)) > 1


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_verify_finds_the_page(pack_folder: Path) -> None:
    assert verify(pack_folder).ok
    with Pack.open(pack_folder) as pack:
        at = pack.page_at(2, 5)
    flip(at.file, at.offset + 100)
    report = verify(pack_folder)
    assert not report.ok and len(report.problems) == 1
    assert "experts-02.safetensors: the pages of experts 5 of layer 2 do not match" in report.problems[0]
    with pytest.raises(BadPack, match="experts 5 of layer 2"):
        report.raise_for_problems()


@pytest.mark.parametrize("file", ["dense-00001.safetensors", "README.md", "experts-01.safetensors"])
def test_verify_finds_any_flipped_bit(pack_folder: Path, file: str) -> None:
    size = (pack_folder / file).stat().st_size
    for at in (0, size // 2, size - 1):
        flip(pack_folder / file, at)
        assert [step.file for step in verify_steps(pack_folder) if step.problem] == [file], at
        flip(pack_folder / file, at)
    assert verify(pack_folder).ok


def test_a_damaged_config(pack_folder: Path) -> None:
    flip(pack_folder / "config.json", 0)
    refused(pack_folder, "config.json can not be read")
    flip(pack_folder / "config.json", 0)
    flip(pack_folder / "config.json", 300)
    assert "config.json does not match its checksum" in verify(pack_folder).problems[0]


def test_verify_steps_add_up(made: Path) -> None:
    steps = list(verify_steps(made))
    assert steps[-1].done_bytes == steps[-1].total_bytes
    assert not any(step.problem for step in steps)


def test_source_and_pack_agree_on_names(made: Path) -> None:
    with Pack.open(made) as pack, Source.open(made.parent / "hf") as source:
        dense = {name for name in source.tensors if ".experts." not in name}
        assert set(pack.tensors) == dense


def test_a_mixed_pack(tmp_path: Path) -> None:
    """Some experts at more bits than others: pages of two sizes, each found, each with its own values."""
    (tmp_path / "hot.toml").write_text('experts = "nf4"\n[rules]\n"layers.2.experts.[35].*" = "int8"\n')
    folder = make(tmp_path, layout="split-bf16", recipe=str(tmp_path / "hot.toml"))
    weights = tiny.oracle_weights(tmp_path / "hf")
    with Pack.open(folder) as pack:
        assert set(pack.layouts) == {"int8", "nf4"} and pack.page == pack.layouts["int8"]
        for expert in range(8):
            codec = "int8" if expert in (3, 5) else "nf4"
            assert pack.page_at(2, expert).codec == codec
            down = pack.layouts[codec].expert(page_bytes(pack, 2, expert)).down.dequantize()
            expected = weights[f"layers.2.experts.{expert}.down"]
            assert (down - expected).norm() < TOLERANCE[codec] * expected.norm()
    assert verify(folder).ok
    page = pack.page
    small = PageLayout("nf4", page.hidden, page.inner)
    edit(folder, lambda m: m["page"].update(codec="nf4", bytes=small.bytes))  # the largest page is larger
    refused(folder, f"layers.2 has a page above {small.bytes} bytes")
