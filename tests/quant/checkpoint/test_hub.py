"""A checkpoint fetched file by file from a server that drops, cuts and corrupts; and files that do not pile up."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from quant import Source, convert
from quant.checkpoint.hub import Hub
from quant.conversion import listing
from quant.conversion.listing import make_listing
from quant.conversion.recipe import Recipe
from quant.conversion.schedule import make_schedule, schedule_of
from quant.errors import BadCheckpoint, Unreachable
from tests.hubserver import HubServer, serving
from tests.packs import add_tokenizer
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("hub") / "hf", layout="split-fp8", n_shards=6, num_hidden_layers=6
    )
    add_tokenizer(folder)
    return folder


@pytest.fixture
def server(checkpoint: Path) -> Iterator[HubServer]:
    with serving(checkpoint) as running:
        yield running


def hub(server: HubServer, tmp_path: Path, *, discard: bool = True) -> Hub:
    return Hub(
        "test/model",
        folder=tmp_path / "pack.download" if discard else None,
        endpoint=server.url,
        cache=tmp_path / "cache",
        pause_s=0.01,
    )


def digests(folder: Path) -> dict[str, str]:
    """Of everything but the name of the model, which is the repository's or the folder's."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.name not in ("README.md", "manifest.json")
    }


def manifest(folder: Path) -> dict:
    found = json.loads((folder / "manifest.json").read_text())
    found["files"].pop("README.md")
    return {key: value for key, value in found.items() if key != "model"}


@pytest.mark.parametrize("discard", [True, False])
def test_the_pack_is_that_of_the_folder(
    checkpoint: Path, server: HubServer, tmp_path: Path, discard: bool
) -> None:
    for _ in convert(checkpoint, tmp_path / "local"):
        pass
    source = Source.on_hub(hub(server, tmp_path, discard=discard))
    with Source.open(checkpoint) as here:
        assert source.fingerprint == here.fingerprint and source.name == "model"
    assert not any(name.endswith(".safetensors") for name in server.gets), "headers come by ranges"
    for _ in convert(source, tmp_path / "pack"):
        pass
    assert digests(tmp_path / "pack") == digests(tmp_path / "local")
    assert manifest(tmp_path / "pack") == manifest(tmp_path / "local")
    assert not list((tmp_path / "pack.download").glob("*.safetensors"))


@pytest.mark.parametrize("fault", ["drop", "short", "corrupt", "busy"])
def test_faults_are_mended(server: HubServer, tmp_path: Path, fault: str) -> None:
    faulty = sorted(file.name for file in server.folder.glob("*.safetensors"))
    for name in faulty[:1] if fault == "drop" else faulty:  # huggingface_hub waits a second after a drop
        server.faults[name] = [fault]
    for _ in convert(Source.on_hub(hub(server, tmp_path)), tmp_path / "pack", dense="bf16", experts="bf16"):
        pass
    assert (tmp_path / "pack" / "manifest.json").is_file()


def test_what_stays_wrong_is_a_sentence(server: HubServer, tmp_path: Path) -> None:
    name = "model-00001-of-00006.safetensors"
    server.faults[name] = ["corrupt"] * 9
    with pytest.raises(BadCheckpoint, match="arrived wrong twice: its SHA-256 is"):
        hub(server, tmp_path).fetch(name)
    assert not (tmp_path / "pack.download" / name).exists()
    server.faults[name] = ["busy"] * 99
    with pytest.raises(Unreachable, match="could not be fetched in 5 attempts.*Run the same command again"):
        hub(server, tmp_path).fetch(name)
    with pytest.raises(BadCheckpoint, match="has no file nothing"):
        hub(server, tmp_path).fetch("nothing.safetensors")


def test_a_wrong_size_in_the_listing(server: HubServer, tmp_path: Path) -> None:
    name = "model-00002-of-00006.safetensors"
    server.listed_sizes[name] = 12_345
    with pytest.raises(BadCheckpoint, match="12,345"):
        hub(server, tmp_path).fetch(name)
    with pytest.raises(BadCheckpoint, match="12,345|cut off|larger than itself"):
        Source.on_hub(hub(server, tmp_path))


def test_names_tokens_and_servers_that_are_not_there(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unreachable, match="HF_TOKEN"):
        Hub("test/other", endpoint=server.url, pause_s=0)
    server.token = "secret"
    with pytest.raises(Unreachable, match="HF_TOKEN"):
        hub(server, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert hub(server, tmp_path).header("model_mtp.safetensors").startswith(b"{")
    with pytest.raises(Unreachable, match="could not be fetched"):
        Hub("test/model", endpoint="http://127.0.0.1:9", pause_s=0)


def test_a_stopped_download_goes_on_and_fetches_nothing_twice(server: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    for stop_after in (1, 3, 5, 99):
        steps = convert(Source.on_hub(hub(server, tmp_path)), out)
        for progress in steps:
            if progress.done_units >= stop_after:
                steps.close()
                break
    assert (out / "manifest.json").is_file()
    shards = {name: n for name, n in server.gets.items() if name.endswith(".safetensors")}
    # A file that was on its way when the run stopped may be asked for again.
    assert len(shards) == 7 and sum(shards.values()) <= 7 + 3
    assert json.loads((tmp_path / "pack.download" / "listing.json").read_text())["commit"]


def test_a_folder_of_another_repository_is_refused(server: HubServer, tmp_path: Path) -> None:
    hub(server, tmp_path)
    with pytest.raises(BadCheckpoint, match="holds a download of test/model"):
        Hub("other/model", folder=tmp_path / "pack.download", endpoint=server.url)


# ---- the schedule ----


def test_schedule_keeps_few_files() -> None:
    reads = {"dense": ["a", "b", "c"], "0": ["a"], "1": ["a", "b"], "2": ["b"], "3": ["c", "d"], "4": ["d"]}
    sizes = dict.fromkeys("abcd", 10)
    found = make_schedule(reads, sizes)
    assert sorted(step.unit for step in found.steps) == sorted(reads)
    here: set[str] = set()
    for step in found.steps:
        here |= set(step.fetch)
        assert set(reads[step.unit]) <= here
        here -= set(step.discard)
    assert not here and found.fetch_bytes == 40
    assert found.peak_bytes <= 40


def test_a_model_in_many_files_never_lies_whole_on_disk(
    checkpoint: Path, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dense units small beside the source's files, as in the real models."""
    monkeypatch.setattr(listing, "DENSE_SHARD", 30_000)
    source = Source.on_hub(hub(server, tmp_path))
    planned = schedule_of(source, make_listing(source, Recipe()), {})
    assert planned.fetch_bytes == sum(source.file_sizes.values()) > 1.5 * planned.peak_bytes
    peak = 0
    for _ in convert(source, tmp_path / "pack"):
        here = (tmp_path / "pack.download").glob("*.safetensors")
        peak = max(peak, sum(file.stat().st_size for file in here))
    assert 0 < peak <= planned.peak_bytes
