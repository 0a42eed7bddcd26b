"""schemathesis makes requests from our own OpenAPI description, right and wrong ones: none of them is a 500."""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest

from localmimo.engine import Engine
from localmimo.serve.endpoints import PATHS, description
from localmimo.serve.http import static as pages
from tests.serve.running import Running


def test_every_route_is_described(server: Running) -> None:
    described = server.http.get("/openapi.json").json()
    assert described == description() and described["openapi"] == "3.1.0"
    assert set(described["paths"]) == PATHS - set(pages.FILES)


@pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="the extra clients is not installed"
)
@pytest.mark.slow
@pytest.mark.timeout(600)  # 50 examples of every operation
def test_no_request_is_a_500(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = engine.stream

    def short(*prompt: Any, **options: Any) -> Any:
        return stream(*prompt, **options | {"max_tokens": min(options["max_tokens"] or 2, 2)})

    monkeypatch.setattr(engine, "stream", short)
    with Running(engine) as server:
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks",
                "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance",
                "--max-examples", "50", "--seed", "1", "--phases", "examples,coverage,fuzzing",
                "--no-color",
            ],
            capture_output=True, text=True, timeout=500, env=os.environ | {"COLUMNS": "150"},
        )  # fmt: skip
        print(done.stdout[-400:])
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert server.http.get("/health").status_code == 200
