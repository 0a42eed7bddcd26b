"""Keys pressed at the prompt, by way of prompt_toolkit's pipe input."""

from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from localmimo.cli.terminal.keys import EntryCompleter, KeyReader

ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A"
PASTE = "\x1b[200~{}\x1b[201~"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path / "home"))


def pressed(keys: str, n_reads: int = 1) -> list[str | None]:
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        reader = KeyReader({"help": list, "read": "paths"}, keys=pipe, screen=DummyOutput())
        return [reader.read() for _ in range(n_reads)]


def test_enter_sends() -> None:
    assert pressed("hello" + ENTER) == ["hello"]


def test_alt_enter_starts_a_new_line() -> None:
    assert pressed("a" + ALT_ENTER + "b" + ENTER) == ["a\nb"]


def test_a_paste_keeps_its_lines() -> None:
    assert pressed(PASTE.format("one\ntwo\n\nthree") + ENTER) == ["one\ntwo\n\nthree"]


def test_ctrl_d_ends() -> None:
    assert pressed(CTRL_D) == [None]


def test_ctrl_c_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt):
        pressed("half a line" + CTRL_C)


def test_history_is_kept_for_the_next_time(tmp_path: Path) -> None:
    assert pressed("first" + ENTER) == ["first"]
    assert pressed(UP + ENTER) == ["first"]
    assert (tmp_path / "home" / "history").stat().st_mode & 0o077 == 0


def completions(text: str) -> list[str]:
    completer = EntryCompleter(
        {"help": list, "read": "paths", "retry": list, "load": lambda: ["my talk", "other"]}
    )
    return [found.text for found in completer.get_completions(Document(text, len(text)), CompleteEvent())]


def test_commands_complete() -> None:
    assert completions("/re") == ["read", "retry"]
    assert completions("/") == ["help", "load", "read", "retry"]
    assert completions("re") == []
    assert completions("/help x") == []


def test_paths_complete_after_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert completions(f"/read {tmp_path}/no") == ["tes.txt"]
    assert completions(f"/read a.txt {tmp_path}/no") == ["tes.txt"]


def test_names_complete_after_load() -> None:
    assert completions("/load ") == ["my talk", "other"]
    assert completions("/load my t") == ["my talk"]


def test_a_draft_can_be_changed() -> None:
    with create_pipe_input() as pipe:
        pipe.send_text("!" + ENTER)
        reader = KeyReader({}, keys=pipe, screen=DummyOutput())
        assert reader.read("why\nnot") == "why\nnot!"


def test_questions_are_not_in_the_history() -> None:
    with create_pipe_input() as pipe:
        reader = KeyReader({}, keys=pipe, screen=DummyOutput())
        pipe.send_text("first" + ENTER)
        assert reader.read() == "first"
        pipe.send_text("y" + ENTER)
        assert reader.ask("run? ") == "y"
        pipe.send_text(CTRL_D)
        assert reader.ask("run? ") is None
        pipe.send_text(UP + ENTER)
        assert reader.read() == "first"
