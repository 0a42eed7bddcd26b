"""Hostile files: each is refused by one of our errors, in one sentence, without taking much memory.

The inputs are those that once broke a reader, and a few random ones. What each reader's own tests check
(tests/quant/files, tests/quant/pack, tests/decode/test_session_state.py, tests/experts/policy) is not repeated.
"""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localmimo.chat.template import ChatTemplate
from localmimo.chat.tokenizer import Tokenizer
from localmimo.cli.terminal.saved_chats import _read as read_conversation
from localmimo.errors import BadModel, BadRequest, BadSession
from localmimo.experts.policy.profile import BadProfile, read_profile, write_profile
from localmimo.experts.policy.profile import Profile as Counted
from localmimo.experts.policy.trace import read_trace
from localmimo.model.config import ModelConfig
from localmimo.system.json_files import read_json
from quant import Recipe
from quant.checkpoint.hub import _read_listing
from quant.checkpoint.published import AUDIO, VISION
from quant.checkpoint.source import INDEX, Source
from quant.conversion.writer import JOURNAL, read_journal
from quant.errors import BadCheckpoint, BadPack, BadRecipe
from quant.files.safetensors import Shard
from quant.pack.pack import Pack
from tests.tiny import make_checkpoint, make_config

DEEP = b"[" * 100_000
HUGE = 10**4000
ODD: tuple[Any, ...] = (
    None, True, "", "x", "\0", "../x", -1, 0.5, 1e308, float("inf"), float("nan"), 10**400, [], {}, [[]], {"a": []},
)  # fmt: skip
MAX_BYTES = 64 << 20  # of memory while a bad file is refused


def refused(read: Callable[[], object], error: type[Exception], says: str = ".") -> None:
    """`read` raises `error`, a short sentence, and takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=f"(?s){says}") as caught:
            read()
        assert len(str(caught.value)) < 2000
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()


def sparse(path: Path, n_bytes: int = 1 << 40) -> Path:
    """A file that is a terabyte long and takes no space."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(n_bytes)
    return path


# ---- safetensors ----


def with_header(path: Path, header: object) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"dtype": "U8", "shape": [1 << 47] * 400, "data_offsets": [0, 1]}, "400 axes"),
        ({"dtype": "U8", "shape": [1] * 50_000, "data_offsets": [0, 1]}, "50,000 axes"),
        ({"dtype": "U8", "shape": [HUGE], "data_offsets": [0, 1]}, "impossible shape"),
        ({"dtype": "U8", "shape": ["x" * 10_000], "data_offsets": [0, 1]}, "impossible shape"),
        ({"dtype": "U8", "shape": [1], "data_offsets": [-HUGE, HUGE]}, "impossible bytes"),
        ({"dtype": "U8", "shape": [1], "data_offsets": [1 << 63, (1 << 63) + 1]}, "impossible bytes"),
        ({"dtype": "Q" * 10_000, "shape": [1], "data_offsets": [0, 1]}, "unknown dtype"),
        ({"dtype": "U8", "shape": [0], "data_offsets": [1 << 40, 1 << 40]}, "hole"),
    ],
)
def test_entries_with_impossible_numbers(tmp_path: Path, entry: dict[str, Any], says: str) -> None:
    path = with_header(
        tmp_path / "a.safetensors", {"t" * 5000: entry} if "hole" not in says else {"t": entry}
    )
    refused(lambda: Shard(path, BadCheckpoint), BadCheckpoint, says)


def test_what_is_no_file(tmp_path: Path) -> None:
    """Folders, pipes and devices: nothing waits for a pipe's other end, nothing reads a device that has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "zero", tmp_path / "loop"):
        refused(lambda: Shard(path, BadCheckpoint), BadCheckpoint, "can not be opened")  # noqa: B023
        refused(lambda: Recipe.load(path), BadRecipe, "can not be read")  # noqa: B023
        refused(lambda: ModelConfig.open(path), BadModel, "cannot be read")  # noqa: B023


def test_a_disk_that_fails_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(with_header(tmp_path / "a.safetensors", {}), BadCheckpoint)

    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    refused(lambda: shard.read(0, 8), BadCheckpoint, "can not be read at byte 0: Input/output error")


def test_bytes_without_end(tmp_path: Path) -> None:
    """Files of a terabyte where a few kilobytes belong."""
    path = sparse(tmp_path / "config.json")
    refused(lambda: Source.open(tmp_path), BadCheckpoint, "more than")
    refused(lambda: ModelConfig.open(path), BadModel, "more than")
    refused(lambda: Recipe.load(path), BadRecipe, "more than")
    refused(lambda: Shard(path, BadPack), BadPack, "is not JSON")
    refused(lambda: read_trace(path), BadRequest, "longer than")
    refused(lambda: read_profile(path, 2, 6), BadProfile, "bytes where 2 layers")


# ---- checkpoints ----


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize(
    "file", ["../out.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "..", "", "a\0.safetensors",
             "config.json", 3, None, ["x"], {}]
)  # fmt: skip
def test_an_index_stays_in_its_folder(checkpoint: Path, file: Any) -> None:
    (checkpoint.parent / "out.safetensors").write_bytes(b"secret")
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = file
    (checkpoint / INDEX).write_text(json.dumps(index))
    refused(lambda: Source.open(checkpoint), BadCheckpoint, "no safetensors file of the folder")


@pytest.mark.parametrize("content", [DEEP, b"", b"\xff\xfe", b"[]", b"null", b"1e999", b'{"weight_map": 3}'])
def test_an_index_that_is_none(checkpoint: Path, content: bytes) -> None:
    (checkpoint / INDEX).write_bytes(content)
    refused(lambda: Source.open(checkpoint), BadCheckpoint)


def of_config(config: dict[str, Any], path: Path) -> None:
    """Both readers of a config.json: each takes it or refuses it in its own words."""
    text = json.dumps(config)
    path.write_text(text)
    for read, error in (
        (lambda: Source.described(text.encode(), "x"), BadCheckpoint),
        (lambda: ModelConfig.open(path), BadModel),
    ):
        try:
            read()
        except error as caught:
            assert len(str(caught)) < 10_000


CONFIG = {**make_config(), "rope_parameters": None, "quantization_config": None, "routed_scaling_factor": 1.0}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(CONFIG)), value=st.sampled_from(ODD))
def test_any_value_under_any_key(tmp_path: Path, key: str, value: object) -> None:
    of_config({**CONFIG, key: value}, tmp_path / "config.json")


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers"])
@pytest.mark.parametrize("value", [(1 << 31) - 1, 10**15, 1e15])
def test_a_config_cannot_ask_for_lists_without_end(tmp_path: Path, key: str, value: float) -> None:
    config = {**CONFIG, key: value, "hybrid_layer_pattern": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: Source.described(json.dumps(config).encode(), "x"), BadCheckpoint, key)
    refused(lambda: ModelConfig.open(tmp_path / "config.json"), BadModel, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_parameters", 3), ("rope_parameters", {"full_attention": 3}), ("rope_theta", float("inf")),
     ("rope_parameters", {"full_attention": {"rope_theta": "x"}}), ("head_dim", float("nan")),
     ("partial_rotary_factor", 1e300), ("layernorm_epsilon", float("nan")), ("hidden_size", 10**400)],
)  # fmt: skip
def test_config_values_that_are_no_sizes(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, key: value}))
    refused(lambda: ModelConfig.open(path), BadModel, f"config.json has (rope_|{key})")


@pytest.mark.parametrize(
    ("tower", "sizes"),
    [
        ("vision_config", {}),
        ("vision_config", {"depth": 1 << 40}),
        ("audio_config", {"input_local_dim": "x"}),
        ("audio_config", {"audio_channels": float("inf")}),
        ("audio_config", {"speech_vocab_size": "x" * 1000}),
    ],
)
def test_towers_that_are_none(tower: str, sizes: dict[str, object]) -> None:
    keys = (VISION if tower == "vision_config" else AUDIO).split() if sizes else []
    text = json.dumps({**CONFIG, tower: {**dict.fromkeys(keys, 1), **sizes}}).encode()
    refused(lambda: Source.described(text, "x"), BadCheckpoint, tower)


@pytest.mark.parametrize("content", [DEEP, b"{" * 100_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"])
def test_json_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    refused(lambda: ModelConfig.open(path), BadModel)
    refused(lambda: read_json(path), BadModel)
    refused(lambda: Source.open(tmp_path), BadCheckpoint)


# ---- packs and journals ----


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, lists by their first entry."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else [(0, value[0])]
        if isinstance(value, list) and value
        else ()
    )
    return [path, *(place for key, inner in pairs for place in places(inner, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], to: object) -> Any:
    if not path:
        return to
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]] if path[1:] else None, path[1:], to)
    return copy


def use(folder: Path) -> None:
    with Pack.open(folder) as pack:
        pack.name, pack.n_bytes, pack.n_pages, pack.layouts, pack.tensors  # noqa: B018
        pack.page_at(1, 0)
        pack.tensor("norm")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_a_manifest(
    bf16_pack: Path, packs: Callable[[str], Path], data: st.DataObject
) -> None:
    manifest = json.loads((packs("bf16") / "manifest.json").read_text())
    place = data.draw(st.sampled_from(places(manifest)))
    (bf16_pack / "manifest.json").write_text(
        json.dumps(changed(manifest, place, data.draw(st.sampled_from(ODD))))
    )
    try:
        use(bf16_pack)
    except BadPack as error:
        assert len(str(error)) < 10_000


@pytest.mark.parametrize("number", ["\u0661", "01", "9" * 5000, "-1", "1_0", " 1"])
def test_layer_numbers_are_plain(bf16_pack: Path, number: str) -> None:
    manifest = json.loads((bf16_pack / "manifest.json").read_text())
    manifest["layers"][number] = manifest["layers"]["1"]
    (bf16_pack / "manifest.json").write_text(json.dumps(manifest))
    refused(lambda: use(bf16_pack), BadPack, "no layer number|layers.9999")


@pytest.mark.parametrize("codec", [[], {}, ["nf4"], 3])
def test_codecs_that_are_no_names(bf16_pack: Path, codec: object) -> None:
    manifest = json.loads((bf16_pack / "manifest.json").read_text())
    n_experts = len(manifest["layers"]["1"]["crc32"])
    for place, value in ((("page", "codec"), codec), (("layers", "1", "codecs"), [codec] * n_experts)):
        (bf16_pack / "manifest.json").write_text(json.dumps(changed(manifest, place, value)))
        refused(lambda: use(bf16_pack), BadPack, "codec")


def test_a_manifest_without_end(bf16_pack: Path) -> None:
    sparse(bf16_pack / "manifest.json")
    with pytest.raises(BadPack, match="1,099,511,627,776 bytes, more than 268,435,456"):
        Pack.open(bf16_pack)


RECORD = {"file": "a", "bytes": 1, "sha256": "0", "distortion": {"x": [1.0, 2.0]}, "crc32": [1]}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(RECORD)), value=st.sampled_from(ODD))
def test_a_journal_line_is_taken_whole_or_left(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "a").write_bytes(b"x")
    lines = [{"settings": {}}, {**RECORD, key: value}]
    (tmp_path / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    had, done = read_journal(tmp_path)
    assert had == {} and done in ({}, {"a": {**RECORD, key: value}})


@pytest.mark.parametrize("file", ["../outside", "/etc/passwd", "link", "sub/a", "..", "."])
def test_a_journal_names_files_of_its_folder(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "p"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside", folder / "sub" / "a"):
        path.write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "outside")
    line = json.dumps({"settings": {}}) + "\n" + json.dumps({**RECORD, "file": file}) + "\n"
    (folder / JOURNAL).write_text(line)
    assert read_journal(folder) == ({}, {})


def test_journals_that_are_none(tmp_path: Path) -> None:
    for content in (DEEP + b"\n", b"\xff\n", b"null\n", b'{"settings": 3}\n', b"{}\n", b""):
        (tmp_path / JOURNAL).write_bytes(content)
        assert read_journal(tmp_path) == (None, {})
    sparse(tmp_path / JOURNAL)
    assert read_journal(tmp_path) == (None, {})


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "", "a\0b", "a/b", 3])
def test_a_download_stays_in_its_folder(tmp_path: Path, name: object) -> None:
    """The listing of a download that was begun says which files are deleted after use."""
    entry = {"name": name, "n_bytes": 1, "sha256": None}
    (tmp_path / "l.json").write_text(json.dumps({"repository": "a/b", "commit": "c", "files": [entry]}))
    assert _read_listing(tmp_path / "l.json", "a/b") is None


# ---- recipes, conversations, traces, statistics ----


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, "x", "rules = 3", "experts = 3", "experts = 'zip'", "[rules]\n'*' = []",
             "[rules]\n'*' = 'zip'", "other = 1", "\0"]
)  # fmt: skip
def test_recipes(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    refused(lambda: Recipe.load(tmp_path / "r.toml"), BadRecipe)


@pytest.mark.parametrize("rules", [[3], [["a"]], ["ab"], [[1, 2, 3]], [["*", "zip"]], 3])
def test_rules_in_a_pack(rules: object) -> None:
    refused(lambda: Recipe.from_dict({"experts": "nf4", "dense": "int8", "rules": rules}), BadRecipe)


SAVED = {
    "version": 1, "messages": [{"role": "user", "content": "a"}], "system": None, "model": "m", "digest": "d",
    "tokens": [1], "turns": [1],
}  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(places(SAVED)), value=st.sampled_from(ODD))
def test_any_value_anywhere_in_a_conversation(tmp_path: Path, place: tuple[Any, ...], value: object) -> None:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps(changed(SAVED, place, value)))
    try:
        read_conversation(path, "x")
    except BadSession as error:
        assert str(path) in str(error)


def test_conversations_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    for content in (DEEP, b"\xff", b"null", b"[]"):
        path.write_bytes(content)
        refused(lambda: read_conversation(path, "x"), BadSession)
    path.write_text(json.dumps({**SAVED, "tokens": [float("inf")]}))
    refused(lambda: read_conversation(path, "x"), BadSession)


LINE = {"step": 0, "layer": 1, "experts": [1, 2]}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(places(LINE)), value=st.sampled_from(ODD))
def test_any_value_anywhere_in_a_trace(tmp_path: Path, place: tuple[Any, ...], value: object) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(changed(LINE, place, value)) + "\n")
    try:
        assert max(read_trace(path).experts) < 1 << 12
    except BadRequest as error:
        assert "line 1" in str(error)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["format", "version", "crc32", "tokens"]), value=st.sampled_from(ODD))
def test_statistics_with_any_facts(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "p.safetensors"
    write_profile(path, Counted.empty(2, 6))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(BadProfile):
        read_profile(path, 2, 6)


# ---- tokenizers and templates ----


@pytest.mark.parametrize(
    "key", ["eos_token", "eos_token_id", "bos_token", "chat_template", "added_tokens_decoder"]
)
@pytest.mark.parametrize(
    "value", [*(odd for odd in ODD if not isinstance(odd, str)), [{"name": 3}], {"content": 3}]
)
def test_any_value_in_a_tokenizers_settings(bf16_pack: Path, tmp_path: Path, key: str, value: object) -> None:
    shutil.copy(bf16_pack / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value}))
    try:
        Tokenizer.open(tmp_path)
        ChatTemplate.open(tmp_path, {}).close()
    except BadModel as error:
        assert "tokenizer_config.json" in str(error)


def test_tokenizers_and_templates_that_are_none(bf16_pack: Path, tmp_path: Path) -> None:
    for content in (
        b"",
        b"[]",
        DEEP,
        b'{"model": {"type": "BPE", "vocab": {"a": 4294967296}, "merges": []}}',
    ):
        (tmp_path / "tokenizer.json").write_bytes(content)
        refused(lambda: Tokenizer.open(tmp_path), BadModel)
    sparse(tmp_path / "tokenizer.json")
    refused(lambda: Tokenizer.open(tmp_path), BadModel, "more than")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refused(lambda: ChatTemplate.open(tmp_path, {}), BadModel, "cannot be read")
    sparse(tmp_path / "chat_template.jinja")
    refused(lambda: ChatTemplate.open(tmp_path, {}), BadModel, "more than")
