"""A small random model with mimo-mini's tokenizer, quick enough for many requests, and servers over it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("httpx2", reason="the extra dev is not installed")

from localmimo import mini
from localmimo.engine import Engine, load
from quant import convert
from tests.serve.running import Running, Scripted, scripted
from tests.tiny import make_checkpoint

MINI = Path(mini.__file__).with_name("mimo-mini")


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    vocabulary = json.loads((MINI / "config.json").read_text())["vocab_size"]
    source = make_checkpoint(
        folder / "random-tiny",
        num_hidden_layers=2,
        mtp=0,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MINI / name, source / name)
    for _ in convert(source, folder / "pack", experts="nf4", dense="int8"):
        pass
    return folder / "pack"


@pytest.fixture(scope="session")
def engine(pack: Path) -> Iterator[Engine]:
    with load(pack, context=4096) as engine:
        yield engine


@pytest.fixture(scope="session")
def server(engine: Engine) -> Iterator[Running]:
    with Running(engine) as running:
        yield running


@pytest.fixture
def script(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    with scripted(engine, monkeypatch) as script:
        yield script
