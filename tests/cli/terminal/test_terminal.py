"""The real program: in a terminal with a real (tiny, random) pack, and the first command of the README."""

import contextlib
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmimo.mini import CHECKPOINT

ROOT = Path(__file__).parents[3]
PYTHON = [sys.executable, "-m", "localmimo"]


class Terminal:
    """A program on a pseudo-terminal of 24 rows and 80 columns."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.end, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.program = subprocess.Popen(
            arguments, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def press(self, keys: str) -> None:
        os.write(self.end, keys.encode())

    def wait_for(self, text: str, timeout_s: float = 60) -> str:
        """Read until the text appears; what came before it, and it, are taken off."""
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} did not appear in {self.shown!r}"
            if select.select([self.end], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # the program went away
                    self.shown += os.read(self.end, 65536).decode(errors="replace")
        before, self.shown = self.shown.split(text, 1)
        return before + text

    def close(self) -> int:
        code = self.program.wait(timeout=30)
        os.close(self.end)
        return code


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return keep | {"LOCALMIMO_HOME": str(tmp_path), "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}


@pytest.fixture
def terminal(bf16_pack: Path, environment: dict[str, str]) -> Iterator[Terminal]:
    terminal = Terminal([*PYTHON, "chat", str(bf16_pack), "-c", "4k", "--temp", "0"], environment)
    yield terminal
    if terminal.program.poll() is None:
        terminal.program.kill()


def test_a_conversation(terminal: Terminal) -> None:
    terminal.wait_for("context 4,096")
    terminal.wait_for("›")
    terminal.press("/set max-tokens=5\r")
    terminal.wait_for("max-tokens 5")
    terminal.press("hello\r")
    terminal.wait_for("+5 tokens")
    terminal.wait_for("›")
    terminal.press("/save smoke\r")
    terminal.wait_for("saved, ")
    terminal.press("/undo\r")
    terminal.wait_for("0 left")
    terminal.press("/load smoke\r")
    terminal.wait_for("to read")
    terminal.press("/edit\r")
    terminal.wait_for("› hello")
    terminal.press("\x15/set max-tokens=off\r")
    terminal.wait_for("max-tokens off")
    terminal.press("go on\r")
    time.sleep(1)  # thousands of tokens are to come
    terminal.press("typed ahead")
    time.sleep(0.2)
    terminal.press("\x03")
    shown = terminal.wait_for("stopped")
    assert "Traceback" not in shown and "typed" not in shown
    terminal.press("/exit\r")
    assert terminal.close() == 0


def test_one_shot_in_a_terminal(bf16_pack: Path, environment: dict[str, str]) -> None:
    terminal = Terminal([*PYTHON, "chat", str(bf16_pack), "hello", "-n", "4"], environment)
    terminal.wait_for("cut at --max-tokens")
    terminal.wait_for("4,096")
    assert terminal.close() == 0


def test_no_colour_when_asked_or_piped(bf16_pack: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*PYTHON, "chat", str(bf16_pack), "hello", "-n", "4", "--stats"],
        capture_output=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0 and b"\x1b" not in done.stdout + done.stderr
    terminal = Terminal([*PYTHON, "verify", str(bf16_pack)], environment | {"NO_COLOR": "1"})
    assert "\x1b[1" not in terminal.wait_for("checksums ok") and "\x1b[2m" not in terminal.shown


@pytest.mark.skipif(not (CHECKPOINT / "config.json").is_file(), reason="mimo-mini has no checkpoint yet")
def test_the_first_command_of_the_readme(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*PYTHON, "chat", "Tell me about rivers.", "-n", "24", "--json"],
        capture_output=True, text=True, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("First use: converting the embedded model mimo-mini")
    answer = json.loads(done.stdout)
    assert answer["text"].strip() and 0 < len(answer["tokens"]) <= 24
    assert answer["config"]["model"]
