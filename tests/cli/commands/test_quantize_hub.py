"""`localmimo quantize OWNER/NAME`: from the hub, from its cache without a network, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.program import localmimo
from tests.hubserver import COMMIT, HubServer, serving
from tests.packs import add_tokenizer
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    folder = make_checkpoint(tmp_path_factory.mktemp("hub") / "hf", layout="fused-fp8", n_shards=4)
    add_tokenizer(folder)
    with serving(folder) as running:
        yield running


def test_dry_run_then_download_and_discard(server: HubServer, tmp_path: Path) -> None:
    ask = (
        "quantize",
        "test/model",
        "-o",
        str(tmp_path / "pack"),
        "--discard-source",
        "--endpoint",
        server.url,
    )
    code, out, err = localmimo(*ask, "--dry-run")
    assert code == 0 and "to fetch, at most" in out and "heavy: []" in err
    assert not [name for name in server.gets if name.endswith(".safetensors")]
    code, out, err = localmimo(*ask, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["status"] == "done" and found["verified"] and found["model"] == "model"
    assert "fetching model-00001-of-00004.safetensors" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pack"]
    code, out, _ = localmimo("plan", str(tmp_path / "pack"), "--ram", "64MiB", "-c", "64", "--json")
    assert code == 0 and json.loads(out)["fits"]


def test_without_a_network_the_cache_serves(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    first = ("quantize", "test/model", "-o", str(tmp_path / "first"), "--endpoint", server.url)
    assert localmimo(*first)[0] == 0
    assert (tmp_path / "cache" / "models--test--model" / "snapshots" / COMMIT).is_dir()
    away = ("quantize", "test/model", "-o", str(tmp_path / "second"), "--endpoint", "http://127.0.0.1:9")
    code, _, err = localmimo(*away, script=IMPATIENT)
    assert code == 0 and "Going on with the copy in the hub's cache" in err
    names = [sorted(p.name for p in (tmp_path / pack).iterdir()) for pack in ("first", "second")]
    assert names[0] == names[1]


IMPATIENT = (
    "import sys; from quant.checkpoint import hub; hub.PAUSE_S = 0; hub.Hub.__init__.__kwdefaults__['pause_s'] = 0; "
    "from localmimo.cli.app import run; sys.exit(run(sys.argv[1:]))"
)


def test_what_is_refused(server: HubServer, tmp_path: Path) -> None:
    code, _, err = localmimo("quantize", str(server.folder), "--discard-source")
    assert code == 2 and "is a folder of yours" in err
    code, _, err = localmimo("quantize", "mimo-v2-pro")
    assert code == 2 and "not public" in err
    code, _, err = localmimo("quantize", "test/nothing", "--endpoint", server.url)
    assert code == 1 and "There is no test/nothing on the hub" in err and "Traceback" not in err
    code, _, err = localmimo("quantize", str(tmp_path / "nowhere"))
    assert code == 4 and "is not a folder" in err


def test_a_generated_checkpoint_is_converted_as_it_is_fetched(tmp_path: Path) -> None:
    from benchmarks.generated import REPOSITORY, first_layers, serving
    from benchmarks.make_checkpoint import Shape, config_of

    shape = Shape(128, 6, 4, 2, 2, 256, 8, 128, 2, 512, 48, 32, fused=True)
    config = first_layers(config_of(shape), 3)
    with serving(config) as hub:
        out = tmp_path / "pack"
        code, said, err = localmimo(
            "quantize", REPOSITORY, "-o", str(out), "--discard-source", "--endpoint", hub.url, "--json"
        )
    assert code == 0, err
    assert json.loads(said)["verified"] and sorted(path.name for path in tmp_path.iterdir()) == ["pack"]
    assert len(list(out.glob("experts-*"))) == 2
