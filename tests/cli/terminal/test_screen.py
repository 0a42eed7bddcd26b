"""What a terminal gets to see: folded thinking, Markdown blocks, no stray control characters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmimo.chat.stream_parser import StreamParser
from localmimo.cli.terminal.screen import Screen, block_end, figures, height
from localmimo.cli.ui import bar, fit, parse_count, rows, seconds, table
from localmimo.decode.steps import DraftStats, Stats, Step
from localmimo.errors import BadRequest
from localmimo.limits import MAX_DRAFTS
from tests.scripted import Capture


class Terminal:
    """Just enough of a terminal: text, line feeds, carriage returns, cursor up, erase."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.row, self.column = width, [""], 0, 0

    def feed(self, text: str) -> "Terminal":
        at = 0
        while at < len(text):
            if text[at] == "\x1b":
                end = next(i for i in range(at + 2, len(text)) if text[i].isalpha())
                self._control(text[end], int(text[at + 2 : end] or 0))
                at = end
            else:
                self._put(text[at])
            at += 1
        return self

    def _control(self, kind: str, n: int) -> None:
        if kind == "A":
            self.row = max(0, self.row - n)
        elif kind == "J":
            self.lines[self.row] = self.lines[self.row][: self.column]
            del self.lines[self.row + 1 :]
        elif kind == "K":
            self.lines[self.row] = self.lines[self.row][: self.column]

    def _put(self, character: str) -> None:
        if character == "\n":
            self._down()
        elif character == "\r":
            self.column = 0
        else:
            if self.column == self.width:
                self._down()
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append("")

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).rstrip("\n")


def show(pieces: list[str], *, width: int = 60, height: int = 24, hide: bool = False) -> tuple[str, str]:
    """(what stays on stdout, what stays on stderr) of a terminal that got an answer in pieces."""
    shown = Capture(terminal=True, width=width, height=height)
    screen, parser = Screen(shown.ui, hide_thinking=hide), StreamParser()
    screen.begin()
    screen.reading(7, 14)
    for number, piece in enumerate(pieces):
        for delta in parser.push(piece):
            screen.show(Step(delta.text, number, delta.kind, Stats()))
    screen.end()
    return Terminal(width).feed(shown.out).text, Terminal(width).feed(shown.err).text


ANSWER = """# Rings

A ring buffer is *fixed* in size: when it is full, the oldest entry makes room for the newest one.
It has two ends.

- head
- tail

```python
def push(x):

    ring[head] = x
```
1. one
2. two <b>bold</b> a < b
"""


def test_a_call_is_seen_while_it_is_written() -> None:
    shown = Capture(terminal=True, width=60)
    screen, parser = Screen(shown.ui), StreamParser([{"name": "write"}])
    screen.begin()
    for letter in "<tool_call><function=write><parameter=path>a.txt</parameter></function></tool_call>":
        for delta in parser.push(letter):
            screen.show(Step("", 1, delta.kind, Stats(), tool_call=delta.tool_call, call_part=delta.part))
    assert '  calling write {"path": "' in shown.err
    screen.end()
    assert Terminal(60).feed(shown.err).text == ""


def test_markdown_is_drawn_block_by_block() -> None:
    out, err = show(list(ANSWER))
    assert err == ""
    assert out == show([ANSWER])[0]
    assert out.splitlines()[0] == "Rings"
    assert "A ring buffer is fixed in size: when it is full, the oldest" in out
    assert "\nIt has two ends.\n\n • head\n • tail\n\n" in out
    assert "\n def push(x):\n\n     ring[head] = x\n\n 1 one\n" in out and "```" not in out
    assert " 2 two <b>bold</b> a < b" in out


@given(
    text=st.lists(
        st.sampled_from(["word ", "\n", "\n\n", "- a\n", "```\n", "x" * 30, "**b** ", "#", "`c`", "<i>"])
    )
)
def test_every_cut_ends_in_the_same_picture(text: list[str]) -> None:
    whole = "".join(text)
    assert show(list(whole), width=40, height=999)[0] == show([whole], width=40, height=999)[0]


def test_a_block_taller_than_the_terminal_stays_plain() -> None:
    text = "".join(f"line **{n}**\n" for n in range(30)) + "\nend\n"
    out, _ = show(list(text), height=10)
    assert out == text.strip()


def test_thinking_folds_to_a_line() -> None:
    out, err = show(["<think>", "let me", " see", "</think>", "yes"])
    assert (out, err) == ("yes", "  thought for 0.0 s, 4 tokens")
    assert show(["<think>", "let me", "</think>", "yes"], hide=True) == ("yes", "")


def test_thinking_that_never_ends_folds_too() -> None:
    assert show(["<think>", "let me"])[1] == "  thought for 0.0 s, 2 tokens"


def test_control_characters_do_not_reach_the_terminal() -> None:
    out, _ = show(["a\x1b[31mb\x07c\td\r"])
    assert out == "a[31mbc    d"


def test_a_pipe_gets_the_bytes_as_they_are() -> None:
    shown = Capture()
    screen = Screen(shown.ui)
    screen.begin()
    for text in ("# a\n", "**b**\t\x1b", "\n\n"):
        screen.show(Step(text, 0, "answer", Stats()))
    screen.end()
    assert shown.out == "# a\n**b**\t\x1b\n\n"


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("", 0), ("a", 0), ("a\n", 0), ("a\n\nb", 3), ("\n\na\n", 0), ("\n\na\n \nb", 6),
        ("```\na\n\nb", 0), ("```\na\n```\nb", 10), ("x\n```py\na\n```\n", 14), ("````\n```\n````\n", 14),
        ("~~~\n```\n~~~\n", 12), ("```\n``` x\n", 0),
    ],
)  # fmt: skip
def test_block_end(text: str, end: int) -> None:
    assert block_end(text) == end


@pytest.mark.parametrize(
    ("text", "n"), [("", 1), ("abcd", 1), ("abcde", 2), ("a\nb", 2), ("日本", 1), ("a日本", 2)]
)
def test_height(text: str, n: int) -> None:
    assert height(text, 4) == n


def test_rows_break_between_facts() -> None:
    assert rows(["one", "two", "three"], 12) == "  one · two\n  three"
    assert rows([], 10) == ""


@pytest.mark.parametrize(
    ("fraction", "drawn"),
    [(0, "────"), (0.125, "╸───"), (0.25, "━───"), (1, "━━━━"), (7, "━━━━"), (-1, "────")],
)
def test_bar(fraction: float, drawn: str) -> None:
    assert bar(fraction, 4) == drawn


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04, "0.0 s"),
        (9.2, "9.2 s"),
        (41.4, "41 s"),
        (200, "3 min 20 s"),
        (1500, "25 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def test_fit() -> None:
    assert fit("abc", 3) == "abc"
    assert fit("abcd", 3) == "ab…"
    assert fit("a\n日本語", 5) == "a 日…"


def test_table() -> None:
    assert table(["group", "n"], [["experts", "36,096"], ["router", "1"]]) == (
        " group         n\n experts  36,096\n router        1"
    )


@pytest.mark.parametrize(
    ("text", "n"), [("4096", 4096), ("32k", 32_768), ("1M", 1 << 20), ("1.5k", 1536), ("32,768", 32_768)]
)
def test_counts(text: str, n: int) -> None:
    assert parse_count(text, "--context") == n


@pytest.mark.parametrize("text", ["", "k", "-1", "many", "1g"])
def test_bad_counts_are_sentences(text: str) -> None:
    with pytest.raises(BadRequest, match=r'^--context is ".*"; write a number such as 4096 or 32k\.$'):
        parse_count(text, "--context")


def test_reading_says_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("localmimo.cli.terminal.screen.time.perf_counter", lambda: now[0])
    shown = Capture(terminal=True)
    screen = Screen(shown.ui)
    screen.begin()
    now[0] += 10
    screen.reading(100, 400)
    assert "  reading 400 tokens ━━━━━───────────────  25%  10 tok/s  left 30 s" in shown.err


def test_the_line_below_names_the_disks_speed_and_the_drafts() -> None:
    drafts = DraftStats(drafted=[8, 2] + [0] * (MAX_DRAFTS - 2), accepted=[5, 1] + [0] * (MAX_DRAFTS - 2))
    stats = Stats(
        3, generated_tokens=2, pages_ram=3, pages_disk=1, bytes_read=6 * 10**9, read_s=2.0, drafts=drafts
    )
    assert figures(stats, 100) == [
        "3+2 tokens", "first token 0.0 s", "drafts 60%", "experts ram 75% disk 25%", "disk 3 GB/s", "context 5/100"
    ]  # fmt: skip
