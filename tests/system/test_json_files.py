"""JSON files: what is read, what is refused, and that lines are written whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from localmimo.errors import BadModel, BadRequest
from localmimo.system.json_files import JsonLines, read_json


class ShortWrites:
    """A file whose every write takes at most three bytes, and that refuses after so many bytes."""

    def __init__(self, file: Any, limit: int = 1 << 30) -> None:
        self.file, self.limit = file, limit

    def write(self, data: memoryview) -> int:
        data = data[: min(3, self.limit - self.file.tell())]
        if not data:
            raise OSError(28, "No space left on device")
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_short_writes_are_continued(tmp_path: Path) -> None:
    lines = [{"n": 1, "text": "ü" * 20}, {"n": 2, "path": Path("/x")}]
    with JsonLines(tmp_path / "log", "--log", append=False) as log:
        log._file = ShortWrites(log._file)  # type: ignore[assignment]
        for line in lines:
            log.write(line)
    read = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert read == [lines[0], {"n": 2, "path": "/x"}]


def test_a_line_that_does_not_fit_leaves_nothing_of_itself(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "log", "--log", append=False) as log:
        log.write({"n": 1})
        log._file = ShortWrites(log._file, limit=20)  # type: ignore[assignment]
        with pytest.raises(
            BadRequest, match=r"^--log: .*log cannot be written \(No space left on device\)\.$"
        ):
            log.write({"n": "x" * 100})
        log.write({"n": 3})  # a small one fits
    assert (tmp_path / "log").read_text() == '{"n": 1}\n{"n": 3}\n'


@pytest.mark.parametrize(("append", "expected"), [(True, ["old", "new"]), (False, ["new"])])
def test_an_old_file_is_continued_or_replaced(tmp_path: Path, append: bool, expected: list[str]) -> None:
    (tmp_path / "log").write_text('{"line": "old"}\n')
    with JsonLines(tmp_path / "log", "--log", append=append) as log:
        log.write({"line": "new"})
    lines = (tmp_path / "log").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == expected


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "log", "--log", append=False) as log:
        log.write({"n": 1})
        assert (tmp_path / "log").read_text() == '{"n": 1}\n'


def test_a_file_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"^--log: .* cannot be written \(Is a directory\)\.$"):
        JsonLines(tmp_path, "--log", append=True)


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    for text, value in (('{"a": ["ü"]}', {"a": ["ü"]}), ("[1]", {}), ("null", {})):
        path.write_text(text, "utf-8")
        assert read_json(path) == value
    path.write_text("{")
    with pytest.raises(BadModel, match=r"a\.json is not valid JSON \(.*\); copy the file again"):
        read_json(path)
