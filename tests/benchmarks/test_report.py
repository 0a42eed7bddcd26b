"""The form of a benchmark's result: one line of JSON, the same in a file, with the facts of the machine."""

import json
from pathlib import Path

import pytest

from benchmarks.report import machine_card, timed, write_result


def test_a_result_is_one_line_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result("speed", {"tps": 2.5, "folder": Path("a")}, tmp_path / "results")
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    found = json.loads(line)
    assert found["benchmark"] == "speed" and found["tps"] == 2.5 and found["folder"] == "a"
    assert found["machine"].keys() == machine_card().keys()
    assert json.loads((tmp_path / "results" / "speed.json").read_text()) == found


def test_a_result_that_can_not_be_kept_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    write_result("speed", {"tps": 1}, tmp_path / "file")
    out, err = capsys.readouterr()
    assert json.loads(out)["tps"] == 1 and err.startswith("The result is not kept: ")


def test_timed_gives_the_result_and_its_seconds() -> None:
    out, seconds = timed(lambda: 7)
    assert out == 7 and 0 <= seconds < 5
