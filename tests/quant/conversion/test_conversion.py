"""Conversions: stopped anywhere they go on, the result is the same to the byte, and memory stays bounded."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from quant import Pack, Recipe, convert, verify
from quant.conversion.writer import JOURNAL, PackWriter, partial_path
from quant.errors import BadRecipe, NoSpace, NotWritable
from tests import tiny

SMALL = {"num_hidden_layers": 3, "n_routed_experts": 4, "vocab_size": 70, "mtp": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("model") / "hf", layout="split-fp8", **SMALL)


@pytest.fixture(scope="module")
def one_shot(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a pack made without interruption."""
    out = tmp_path_factory.mktemp("once") / "pack"
    run(source, out)
    return files_of(out)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several dense files and several bands per matrix, as in a big model."""
    monkeypatch.setattr("quant.conversion.listing.DENSE_SHARD", 60_000)
    monkeypatch.setattr("quant.conversion.packing.BAND", 2048)


@pytest.fixture(scope="module", autouse=True)
def small_units_for_the_module() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quant.conversion.listing.DENSE_SHARD", 60_000)
        patch.setattr("quant.conversion.packing.BAND", 2048)
        yield


def run(source: Path, out: Path, **settings: object) -> list:
    return list(convert(source, out, **settings))


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_progress(source: Path, tmp_path: Path) -> None:
    steps = run(source, tmp_path / "pack")
    done = [step.done_bytes for step in steps]
    assert done == sorted(done) and done[-1] == steps[-1].total_bytes
    assert steps[-1].done_units == steps[-1].total_units > 4
    assert all(step.resumed_bytes == 0 for step in steps)
    assert 0 < steps[-1].rms_error < steps[-1].worst_error < 0.1
    assert ".experts." in steps[-1].worst_name
    assert verify(tmp_path / "pack").ok


def test_nothing_is_left_beside_the_pack(source: Path, tmp_path: Path, one_shot: dict[str, bytes]) -> None:
    run(source, tmp_path / "pack")
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]
    assert files_of(tmp_path / "pack") == one_shot
    assert JOURNAL not in one_shot and not any(name.endswith(".tmp") for name in one_shot)


def test_no_clock_no_path_no_thread_count(source: Path, tmp_path: Path, one_shot: dict[str, bytes]) -> None:
    shutil.copytree(source, tmp_path / "elsewhere" / "hf")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run(tmp_path / "elsewhere" / "hf", tmp_path / "pack")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert files_of(tmp_path / "pack") == one_shot


def test_already_done(source: Path, tmp_path: Path, one_shot: dict[str, bytes]) -> None:
    run(source, tmp_path / "pack")
    (step,) = run(source, tmp_path / "pack")
    assert step.note == "already done" and step.done_bytes == step.total_bytes == step.resumed_bytes
    assert files_of(tmp_path / "pack") == one_shot
    with pytest.raises(NotWritable, match="is complete"):
        convert(source, tmp_path / "pack", restart=True)


def test_closing_the_iterator_keeps_finished_units(
    source: Path, tmp_path: Path, one_shot: dict[str, bytes]
) -> None:
    out = tmp_path / "pack"
    steps = convert(source, out)
    for step in steps:
        if step.done_units == 3:
            break
    steps.close()
    assert not out.exists() and len(list(partial_path(out).glob("*.safetensors"))) == 3
    resumed = run(source, out)
    assert resumed[0].resumed_bytes > 0 and resumed[0].done_units == 3
    assert resumed[-1].rms_error == pytest.approx(run(source, tmp_path / "other")[-1].rms_error, rel=1e-12)
    assert files_of(out) == one_shot


# Killed


def die_at(call: int, half: bool) -> None:
    """Kill this process at its n-th disk operation, before it or halfway through a write."""
    count = 0

    def watched(original: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == call:
                if half and original is pwrite:
                    pwrite(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])  # type: ignore[arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapper

    pwrite = os.pwrite
    for name in ("pwrite", "fsync", "replace", "rename", "mkdir", "unlink"):
        setattr(os, name, watched(getattr(os, name)))


def convert_in_child(source: Path, out: Path, before: Callable[[], None]) -> int:
    """Convert in a forked process; returns the signal that ended it, 0 when it finished."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            before()
            run(source, out)
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_everywhere(source: Path, folder: Path, one_shot: dict[str, bytes], calls: list[int]) -> None:
    for call in calls:
        out = folder / f"pack-{call}"
        killed = convert_in_child(source, out, partial(die_at, call, half=bool(call % 2)))
        assert killed == signal.SIGKILL
        if not out.exists():
            with pytest.raises(Exception, match="is no pack"):
                Pack.open(out)
        run(source, out)
        assert files_of(out) == one_shot, f"killed at disk operation {call}"
        assert sorted(path.name for path in folder.iterdir()) == [out.name]
        shutil.rmtree(out)


def n_disk_operations(source: Path, out: Path) -> int:
    """How many of the watched operations a whole conversion takes, found by bisection on survival."""
    low, high = 1, 4096
    while low < high:
        middle = (low + high) // 2
        killed = convert_in_child(source, out, partial(die_at, middle, half=False))
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial_path(out), ignore_errors=True)
        low, high = (middle + 1, high) if killed else (low, middle)
    return low - 1


def test_killed_at_any_disk_operation(source: Path, tmp_path: Path, one_shot: dict[str, bytes]) -> None:
    last = n_disk_operations(source, tmp_path / "count")
    # The last ones are the delicate ones: the manifest, the journal's end, the final name.
    calls = [1, 2, 3, 7, last // 3, last // 2, *range(last - 9, last + 1)]
    kill_everywhere(source, tmp_path, one_shot, calls)


@pytest.mark.slow
def test_killed_at_every_disk_operation(source: Path, tmp_path: Path, one_shot: dict[str, bytes]) -> None:
    last = n_disk_operations(source, tmp_path / "count")
    kill_everywhere(source, tmp_path, one_shot, list(range(1, last + 1)))


@pytest.mark.slow
def test_killed_again_and_again_by_the_clock(
    source: Path, tmp_path: Path, one_shot: dict[str, bytes]
) -> None:
    draw = random.Random(5)
    for _ in range(20):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                torch.set_num_threads(1)
                run(source, tmp_path / "pack")
            os._exit(0)
        time.sleep(draw.uniform(0.005, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (tmp_path / "pack").exists():
            assert files_of(tmp_path / "pack") == one_shot
            shutil.rmtree(tmp_path / "pack")
    run(source, tmp_path / "pack")
    assert files_of(tmp_path / "pack") == one_shot


def interrupted(source: Path, out: Path, units: int = 2) -> Path:
    """A conversion that was stopped after some units; returns the partial folder."""
    steps = convert(source, out)
    for step in steps:
        if step.done_units == units:
            break
    steps.close()
    return partial_path(out)


@pytest.mark.parametrize("cut", [1, 5, 40, 300])
def test_a_torn_journal_line(source: Path, tmp_path: Path, one_shot: dict[str, bytes], cut: int) -> None:
    journal = interrupted(source, tmp_path / "pack") / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-cut])
    run(source, tmp_path / "pack")
    assert files_of(tmp_path / "pack") == one_shot


def test_a_finished_file_that_vanished_or_shrank(
    source: Path, tmp_path: Path, one_shot: dict[str, bytes]
) -> None:
    begun = interrupted(source, tmp_path / "pack", units=3)
    first, second, *_ = sorted(begun.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    run(source, tmp_path / "pack")
    assert files_of(tmp_path / "pack") == one_shot


# Refused


def test_other_settings_are_refused_by_name(source: Path, tmp_path: Path, one_shot: dict[str, bytes]) -> None:
    out = tmp_path / "pack"
    begun = interrupted(source, out)
    with pytest.raises(
        BadRecipe, match=r"pack\.partial was made with experts = nf4, now experts = int8 .*--restart"
    ):
        convert(source, out, experts="int8")
    with pytest.raises(BadRecipe, match="dense = int8, now dense = bf16"):
        convert(source, out, dense="bf16")
    other = tiny.make_checkpoint(tmp_path / "other", seed=9, **SMALL)
    with pytest.raises(BadRecipe, match="source = "):
        convert(other, out)
    assert begun.exists()
    run(source, out, experts="int8", restart=True)
    with pytest.raises(
        BadRecipe, match=r"pack was made with experts = int8, now experts = nf4 .*Choose another"
    ):
        convert(source, out)
    with pytest.raises(BadRecipe, match="rules = "):
        convert(source, out, recipe=Recipe("int8", "int8").keeping("head"))


def test_something_else_is_in_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotWritable, match="exists and is not a folder"):
        convert(source, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    with pytest.raises(NotWritable, match="is not a complete pack"):
        convert(source, tmp_path / "folder")
    (tmp_path / "pack.partial").mkdir()
    (tmp_path / "pack.partial" / "precious").write_text("x")
    for restart in (False, True):
        with pytest.raises(NotWritable, match="in the way"):
            convert(source, tmp_path / "pack", restart=restart)
    assert (tmp_path / "pack.partial" / "precious").exists()


def test_an_empty_folder_is_no_obstacle(source: Path, tmp_path: Path, one_shot: dict[str, bytes]) -> None:
    (tmp_path / "pack").mkdir()
    run(source, tmp_path / "pack")
    assert files_of(tmp_path / "pack") == one_shot


def test_two_converters(source: Path, tmp_path: Path) -> None:
    first = convert(source, tmp_path / "pack")
    next(first)
    with pytest.raises(NotWritable, match="Another process is converting"):
        run(source, tmp_path / "pack")
    with pytest.raises(NotWritable, match="Another process is converting"):
        convert(source, tmp_path / "pack", restart=True)
    for _ in first:
        pass
    assert verify(tmp_path / "pack").ok


Usage = namedtuple("Usage", "total used free")


def test_too_little_space_is_refused_beforehand(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 100_000))
    with pytest.raises(
        NoSpace, match=r"has 100\.0 kB free; \d+\.\d kB are still needed.*run the same command again"
    ):
        convert(source, tmp_path / "pack")
    assert not list(tmp_path.iterdir())


def test_the_disk_fills_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_shot: dict[str, bytes]
) -> None:
    room = 150_000

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(fd, data, offset)

    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(NoSpace, match="run the same command again: finished files are kept"):
        run(source, tmp_path / "pack")
    monkeypatch.setattr(os, "pwrite", original)
    steps = run(source, tmp_path / "pack")
    assert steps[0].resumed_bytes > 0
    assert files_of(tmp_path / "pack") == one_shot


def test_a_read_only_target(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritable, match="can not be written: Not a directory"):
        run(source, tmp_path / "file" / "pack")

    def mkdir(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(NotWritable, match=r"pack\.partial can not be written: Read-only file system"):
        run(source, tmp_path / "pack")


def test_settings_survive_json(source: Path, tmp_path: Path) -> None:
    settings = {"experts": "nf4", "rules": [["head", "keep"]]}
    with PackWriter(tmp_path / "pack", settings, 0):
        pass
    with PackWriter(tmp_path / "pack", json.loads(json.dumps(settings)), 0) as writer:
        assert writer.done == {}


MEMORY = """
import resource, sys
import torch
import quant, quant.conversion.packing
from quant.ops.quantize import quantize
torch.set_num_threads(2)
quantize(torch.randn(64, 1024), "nf4").dequantize()
quant.conversion.packing.BAND = 1 << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in quant.convert(sys.argv[1], sys.argv[2], dense=sys.argv[3]):
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("dense", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_matrix(tmp_path: Path, dense: str) -> None:
    """Embedding and head of 31 MB each pass through in bands of a million weights."""
    shape = {
        "vocab_size": 15_000,
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "mtp": 0,
        "n_routed_experts": 4,
    }
    folder = tiny.make_checkpoint(tmp_path / "hf", **shape)
    command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "pack"), dense]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 50_000, f"peak memory grew by {int(grown):,} kB"
