"""One embedded model for all servers of these tests, and the servers."""

from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="the extra clients is not installed")

from localmimo.embedded import embedded_pack
from localmimo.engine import Engine, load

from .running import Running, Scripted, scripted


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with load(embedded_pack()) as engine:
        yield engine


@pytest.fixture(scope="session")
def server(engine: Engine) -> Iterator[Running]:
    with Running(engine) as running:
        yield running


@pytest.fixture
def script(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    with scripted(engine, monkeypatch) as script:
        yield script
