"""Safetensors files: hostile headers are refused in a sentence, our own files open in stock tools."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quant.errors import BadCheckpoint
from quant.files.safetensors import Shard, plan_shard
from quant.formats.codec import PartSpec

ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def write(path: Path, header: object, data: bytes = b"\0" * 4, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def refused(path: Path, words: str) -> None:
    with pytest.raises(BadCheckpoint, match=words) as caught:
        Shard(path, BadCheckpoint)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "U8", "shape": [4]}, "malformed"),
        ({"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}, "malformed"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [0]}, "malformed"),
        ({"dtype": "Q4", "shape": [4], "data_offsets": [0, 4]}, "unknown dtype 'Q4'"),
        ({"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]}, "impossible shape"),
        ({"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}, "impossible shape"),
        ({"dtype": "U8", "shape": [1 << 60], "data_offsets": [0, 4]}, "impossible shape"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}, "spans 4 bytes.*needs 16"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}, "spans"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}, "spans"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [1, 5]}, "hole"),
        ({"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "cut off"),
        ({"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "belong to no tensor"),
    ],
)
def test_hostile_entries(tmp_path: Path, entry: dict, words: str) -> None:
    refused(write(tmp_path / "bad.safetensors", {"t": entry}), words)


def test_hostile_headers(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    refused(write(path, {"t": ENTRY}, length=1 << 62), "has a header of")
    refused(write(path, {"t": ENTRY}, length=5000), "cut off.*5,008.*has")
    refused(write(path, b"{"), "not JSON")
    refused(write(path, b"\xff\xfe{}"), "not JSON")
    refused(write(path, b"[" * 100_000), "not JSON")
    refused(write(path, []), "not a JSON object")
    refused(write(path, {"t": 3}), "malformed")
    refused(write(path, b'{"t":1,"t":2}'), "twice")
    path.write_bytes(b"abc")
    refused(path, "3 bytes")
    refused(tmp_path / "none.safetensors", "No such file")


def test_overlap_and_hole(tmp_path: Path) -> None:
    other = {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}
    refused(write(tmp_path / "bad.safetensors", {"a": ENTRY, "b": other}, b"\0" * 6), "overlaps")
    other = {"dtype": "U8", "shape": [4], "data_offsets": [6, 10]}
    refused(write(tmp_path / "bad.safetensors", {"a": ENTRY, "b": other}, b"\0" * 10), "hole")


def test_truncation_names_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"t": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(path, f"describes {len(whole):,} bytes, it has {len(whole) - 100:,}")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_reads_within_bounds(tmp_path: Path, data: st.DataObject) -> None:
    """Flip, cut or insert anywhere in a small file: never a crash, never a read outside the file."""
    path = tmp_path / "fuzz.safetensors"
    save_file({"a": torch.arange(6).float(), "b": torch.ones(3, 2, dtype=torch.bfloat16)}, path)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert"])):
        case "flip":
            raw[at] = data.draw(st.integers(0, 255))
        case "cut":
            del raw[at:]
        case _:
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    path.write_bytes(raw)
    try:
        shard = Shard(path, BadCheckpoint)
    except BadCheckpoint:
        return
    for tensor in shard.tensors.values():
        assert tensor.offset + tensor.nbytes <= len(raw)
        assert shard.read(tensor.offset, tensor.nbytes).numel() == tensor.nbytes


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60), length=st.integers(0, 1 << 64) | st.none())
def test_any_header(tmp_path: Path, text: str, length: int | None) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    path = write(tmp_path / "any.safetensors", raw, length=min(length, (1 << 64) - 1) if length else None)
    try:
        stock = load_file(path)
    except (SafetensorError, OSError, ValueError):
        stock = None
    try:
        ours = Shard(path, BadCheckpoint)
    except BadCheckpoint:
        return
    assert stock is not None and ours.tensors.keys() == stock.keys()


def test_planned_files_open_in_stock_tools(tmp_path: Path) -> None:
    specs = {"odd": PartSpec("u8", (3,)), "half": PartSpec("bf16", (5,)), "wide": PartSpec("f32", (2, 2))}
    for align in (8, 4096):
        plan = plan_shard("planned.safetensors", specs, align=align)
        assert plan.data_offset % align == 0
        assert list(plan.offsets) == ["wide", "half", "odd"]
        path = tmp_path / plan.file
        path.write_bytes(plan.header + bytes(plan.n_bytes - plan.data_offset))
        assert {name: tuple(t.shape) for name, t in load_file(path).items()} == {
            name: spec.shape for name, spec in specs.items()
        }
        shard = Shard(path, BadCheckpoint)
        assert {name: t.offset for name, t in shard.tensors.items()} == plan.offsets
        assert plan.offsets["wide"] % 4 == 0 and plan.offsets["half"] % 2 == 0


def test_a_file_that_shrinks_while_open(tmp_path: Path) -> None:
    path = tmp_path / "shrinks.safetensors"
    save_file({"t": torch.zeros(1000)}, path)
    shard = Shard(path, BadCheckpoint)
    stored = shard.tensors["t"]
    with path.open("r+b") as file:
        file.truncate(stored.offset + 10)
    with pytest.raises(BadCheckpoint, match="ends 3,990 bytes early"):
        shard.read(stored.offset, stored.nbytes)


def test_a_header_is_as_long_as_the_reader_allows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"t": ENTRY})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    Shard(path, BadCheckpoint, max_header=length).close()
    with pytest.raises(BadCheckpoint, match=f"{length:,} bytes; at most {length - 1:,}"):
        Shard(path, BadCheckpoint, max_header=length - 1)


def test_a_described_file_must_be_the_one_that_comes(tmp_path: Path) -> None:
    """Of the same size, with another header: what is read from it would mean something else."""
    path = write(tmp_path / "a.safetensors", {"t": ENTRY}, b"abcd")
    header, n_bytes = path.read_bytes()[8:-4], path.stat().st_size
    described = Shard.of_header(path, BadCheckpoint, header, n_bytes)
    assert bytes(described.read(described.tensors["t"].offset, 4).tolist()) == b"abcd"
    described.close()
    for other in ({"u": ENTRY}, {"t": ENTRY, "__metadata__": {}}):
        write(path, other, b"abcd")
        described = Shard.of_header(path, BadCheckpoint, header, n_bytes)
        with pytest.raises(BadCheckpoint, match="not the file whose header"):
            described.read(described.tensors["t"].offset, 4)
