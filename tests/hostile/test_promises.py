"""Promises: the tests that documents name exist, and the lowest versions are the tested ones."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# A file of tests, with one of its tests or none; a test of the file named before it; a benchmark; a script of CI.
NAMED = re.compile(
    r"(?P<file>tests/[\w/]+\.py)(?:::(?P<test>\w+))?|`(?P<bare>test_\w+)`"
    r"|python -m (?P<module>benchmarks\.\w+)|(?P<script>\.ci/\w+)"
)


def broken_names(text: str) -> list[str]:
    """What a document names and the repository lacks."""
    broken, file = [], ""
    for match in NAMED.finditer(text):
        file = match["file"] or file
        path = match["script"] or (f"{match['module'].replace('.', '/')}.py" if match["module"] else file)
        test = match["test"] or match["bare"]
        if not (ROOT / path).is_file() or (test and f"def {test}(" not in (ROOT / path).read_text()):
            broken.append(match[0])
    return broken


@pytest.mark.parametrize("document", ["SECURITY.md", "RELIABILITY.md"])
def test_everything_that_a_promise_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    assert len(NAMED.findall(text)) > 10
    assert not broken_names(text)


@pytest.mark.parametrize(
    "text",
    [
        "`tests/hostile/test_nothing.py`",
        "`tests/hostile/test_nothing.py::test_x`",
        "`tests/hostile/test_promises.py::test_x`",
        "`tests/hostile/test_promises.py` (`test_x`)",
        "`pytest -m slow tests/hostile/test_nothing.py`",
        "`python -m benchmarks.nothing --pairs 3`",
        "`.ci/nothing`",
    ],
)
def test_a_name_that_does_not_exist_is_found(text: str) -> None:
    assert broken_names(text)


SCRIPTS = sorted([*(ROOT / ".ci").iterdir(), *(ROOT / ".github" / "workflows").iterdir()])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_path_in_a_script_of_ci_exists(script: Path) -> None:
    paths = re.findall(r"(?<![\w/])(?:tests|examples|benchmarks|\.ci)/[\w./]*\w", script.read_text())
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_lowest_versions_are_the_tested_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["serve"], *extras["grammar"], *extras["plot"]]
    lines = (ROOT / "constraints-min.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", one).groups() for one in asked)  # type: ignore[union-attr]
    assert bounds.keys() == {name if name in bounds else name.lower() for name in pins}
    for name, pin in pins.items():
        bound = bounds.get(name) or bounds[name.lower()]
        assert f"{pin}.".startswith(f"{bound}."), f"{name}: {bound} in pyproject.toml, {pin} was tested"
