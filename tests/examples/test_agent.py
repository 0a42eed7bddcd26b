"""The tools of examples/agent.py keep to their folder and their limits."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from localmimo.tools.tool import Tool

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent.py"


@pytest.fixture(scope="module")
def agent() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_agent", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(agent: ModuleType, tmp_path: Path) -> tuple[Callable[..., str], Callable[..., str]]:
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("the secret word")
    (inside / "a.txt").write_text("one\nthe word\nthree")
    (inside / "sub" / "b.py").write_text("word = 1")
    (inside / "link.txt").symlink_to(tmp_path / "secret.txt")
    (inside / "big.txt").write_text("word " * (1 << 19))
    search, read = agent.Folder(inside).tools()
    return search, read


def test_search_and_read(files: tuple[Callable[..., str], Callable[..., str]]) -> None:
    search, read = files
    assert search("w.rd") == "a.txt:2: the word\nsub/b.py:1: word = 1"
    assert search("word", "**/*.py") == "sub/b.py:1: word = 1"
    assert search("zzz") == "nothing found"
    assert read("a.txt", 2) == "the word\nthree\n[2 of 3 lines]"


@pytest.mark.parametrize("path", ["../secret.txt", "link.txt", "sub/../../secret.txt", "/etc/passwd"])
def test_nothing_outside_is_read(files: tuple[Callable[..., str], Callable[..., str]], path: str) -> None:
    result = Tool.of(files[1]).call({"path": path})
    assert result == f"error: PermissionError: {path} is outside the folder."


def test_large_files_are_refused(files: tuple[Callable[..., str], Callable[..., str]]) -> None:
    assert Tool.of(files[1]).call({"path": "big.txt"}) == "error: ValueError: big.txt is larger than 1 MiB."


def test_python_has_limits(agent: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setattr(agent, "CPU_S", 1)
    monkeypatch.setattr(agent, "WALL_S", 20)
    assert agent.python("import os; print(6 * 7, os.environ.get('SECRET'))").endswith("42 None\n")
    assert "MemoryError" in agent.python("x = bytes(1 << 30)")
    assert "exit code -" in agent.python("while True: pass")
    assert "File too large" in agent.python("open('x', 'wb').write(bytes(1 << 20))")
    assert len(agent.python("print('x' * 10_000_000)")) < 100_000
    monkeypatch.setattr(agent, "WALL_S", 0.5)
    assert agent.python("import time; time.sleep(60)").endswith("[took too long]")


def test_python_has_no_network(agent: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        printed = agent.python(
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 2); print('reached')"
        )
    assert "reached" not in printed or "does not let us take the network away" in printed


def test_the_calculator_takes_sums_only(agent: ModuleType) -> None:
    assert agent.calculator("2 + 3 * 4").endswith("14")
    assert (
        Tool.of(agent.calculator)
        .call({"expression": "__import__('os')"})
        .startswith("error: ValueError: only")
    )


def test_it_shows_its_usage() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(EXAMPLE.parents[1])},  # whether or not it is installed
    )
    assert done.returncode == 0 and "--folder" in done.stdout
