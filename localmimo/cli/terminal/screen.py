"""Screen: shows one answer while it is made: reading, thinking (folded to a line), Markdown block by block.

Knows steps and terminals; nothing of engines, files or conversations.
"""

from __future__ import annotations

import re
import termios
import time
from typing import TYPE_CHECKING, Any, ClassVar

from rich.cells import cell_len
from rich.console import Console

from localmimo.cli.ui import Ui, bar, printable, seconds

if TYPE_CHECKING:
    from localmimo.decode.steps import Stats, Step

STDIN = 0
STYLES = re.compile(r"\x1b\[[0-9;]*m")
FENCE = re.compile(r"\s*(`{3,}|~{3,})")


class Screen:
    """Shows an answer: its text on stdout, all else on stderr."""

    def __init__(self, ui: Ui, *, plain: bool = False, hide_thinking: bool = False, hint: str = "") -> None:
        self._ui = ui
        self._hint = hint  # where folded thinking can be read
        self._hide_thinking = hide_thinking
        self._redraws = ui.status.enabled and not plain
        self._terminal = ui.out.is_terminal
        blocks = self._terminal and not plain and not ui.out.is_dumb_terminal
        self._blocks = MarkdownBlocks(ui.out) if blocks else None
        self._began = 0.0
        self._thought = ""
        self._thought_tokens = 0
        self._called = ""  # arguments of a call that is being written
        self._line_open = False  # stdout is in the middle of a line
        self._terminal_settings: list[Any] | None = None  # how the terminal was before the answer

    def begin(self) -> None:
        """An answer begins. What is typed meanwhile waits for the next prompt and is not shown in the answer."""
        self._terminal_settings = _disable_echo() if self._terminal else None
        self._began = time.perf_counter()
        self._thought, self._thought_tokens, self._called = "", 0, ""

    def reading(self, done: int, total: int) -> None:
        """Prompt tokens read so far; an engine's progress callback."""
        if self._redraws and total:
            speed = done / max(1e-9, time.perf_counter() - self._began)
            left = f"  left {seconds((total - done) / speed)}" if 0 < done < total and speed > 0 else ""
            self._ui.status.show(
                f"  reading {total:,} tokens {bar(done / total)} {done / total:4.0%}  {speed:.0f} tok/s{left}"
            )

    def show(self, step: Step) -> None:
        """One step of the answer."""
        match step.kind:
            case "thinking":
                self._think(step.text, step.token is not None)
            case "answer" if step.text:
                self._say(step.text)
            case "tool_call":  # the finished call is shown when it is run
                self._call(step)

    def end(self) -> None:
        """The answer is over: finish what is open and restore the terminal."""
        self._fold()
        if self._blocks:
            self._blocks.finish()
        elif self._line_open:
            self._ui.data("")
        self._line_open = False
        self._ui.status.clear()
        if self._terminal_settings is not None:
            termios.tcsetattr(STDIN, termios.TCSANOW, self._terminal_settings)
            self._terminal_settings = None

    def _think(self, text: str, is_token: bool) -> None:
        if not self._thought:
            self._began = time.perf_counter()
        self._thought_tokens += is_token
        started = bool(self._thought)
        self._thought += text
        if self._hide_thinking or self._ui.quiet:
            return
        if self._redraws:
            tail = " ".join(self._thought[-400:].split())
            head = f"  thinking {seconds(time.perf_counter() - self._began)} "
            self._ui.status.show(head + _tail(tail, self._ui.err.width - cell_len(head) - 1))
        elif text:
            head = "" if started else "thinking: "
            self._ui.err.file.write(head + (printable(text) if self._ui.err.is_terminal else text))
            self._ui.err.file.flush()

    def _call(self, step: Step) -> None:
        """Show the end of a call while it is written, on the status line: writing it may take long."""
        self._fold()
        if step.call_part is None or not self._redraws or step.tool_call is not None:
            self._called = ""
            self._ui.status.clear()
            return
        self._called += step.call_part.arguments
        head = f"  calling {printable(step.call_part.name)} "
        self._ui.status.show(head + _tail(self._called[-400:], self._ui.err.width - cell_len(head) - 1))

    def _fold(self) -> None:
        """Thinking is over: replace it with one line."""
        if not self._thought:
            return
        if self._redraws and not self._hide_thinking:
            spent = seconds(time.perf_counter() - self._began)
            self._ui.parts(
                [f"thought for {spent}, {self._thought_tokens} tokens", *([self._hint] if self._hint else [])]
            )
        elif not self._hide_thinking and not self._ui.quiet:
            self._ui.err.file.write("\n")
            self._ui.err.file.flush()
        self._thought = ""

    def _say(self, text: str) -> None:
        self._fold()
        self._ui.status.clear()
        text = printable(text.replace("\t", "    ")) if self._terminal else text
        if self._blocks:
            self._blocks.write(text)
        else:
            self._ui.data(text, end="")
            self._line_open = not text.endswith("\n") if text else self._line_open


def _disable_echo() -> list[Any] | None:
    """Turn the echo of keys off; the settings before, None where stdin is no terminal."""
    try:
        before = termios.tcgetattr(STDIN)
    except (termios.error, OSError):
        return None
    termios.tcsetattr(STDIN, termios.TCSANOW, [*before[:3], before[3] & ~termios.ECHO, *before[4:]])
    return before


class MarkdownBlocks:
    """Markdown as it grows: the unfinished block as plain text, replaced by the rendered one when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = ""  # the unfinished block, as it stands on the screen
        self._n_blocks = 0

    def write(self, text: str) -> None:
        whole = self._shown + text
        end = block_end(whole) if "\n" in text else 0
        if end == 0:
            self._plain(text)
            return
        self._replace(whole[:end])
        if rest := whole[end:].lstrip("\n"):
            self.write(rest)

    def finish(self) -> None:
        if self._shown.strip():
            self._replace(self._shown)
        self._shown, self._n_blocks = "", 0

    def _plain(self, text: str) -> None:
        if not self._shown:
            text = text.lstrip("\n")
            self._part(text)
        self._shown += text
        self._console.file.write(text)
        self._console.file.flush()

    def _part(self, text: str) -> None:
        """An empty line between blocks."""
        if text and self._n_blocks:
            self._console.file.write("\n")

    def _replace(self, block: str) -> None:
        """Draw a finished block where its plain text stands; one that has scrolled away stays plain."""
        up = height(self._shown, self._console.width) - 1
        if up >= self._console.height - 1:
            ending = (block.rstrip("\n") + "\n")[len(self._shown) :]
            self._console.file.write(ending)
        else:
            if not self._shown:
                self._part(block)
            back = f"\x1b[{up}A" if up else ""
            self._console.file.write(f"\r{back}\x1b[J{self._drawn(block)}\n")
        self._console.file.flush()
        self._shown = ""
        self._n_blocks += 1

    def _drawn(self, block: str) -> str:
        """The rendered block without the empty lines and the padding that rich puts around it."""
        with self._console.capture() as drawn:
            self._console.print(_markdown(block.strip("\n")))
        lines = [line.rstrip() for line in drawn.get().split("\n")]
        while lines and not STYLES.sub("", lines[0]).strip():
            del lines[0]
        while lines and not STYLES.sub("", lines[-1]).strip():
            del lines[-1]
        return "\n".join(lines)


def block_end(text: str) -> int:
    """Where the first finished Markdown block ends, at a blank line or a closed code fence; 0 for none."""
    fence, at, said = "", 0, False
    for line in text.splitlines(keepends=True):
        at += len(line)
        if not line.endswith("\n"):
            return 0
        mark = FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                return at
        elif mark:
            fence, said = mark[1], True
        elif line.strip():
            said = True
        elif said:
            return at
    return 0


def height(text: str, width: int) -> int:
    """Rows that a terminal of this width spends on the text."""
    count = 0
    for line in text.split("\n"):
        count, column = count + 1, 0
        for character in line:
            cells = cell_len(character)
            if column + cells > width:
                count, column = count + 1, 0
            column += cells
    return count


def _markdown(text: str) -> Any:
    """Rendered Markdown that loses nothing: line breaks stay, and tags in the text are text."""
    from markdown_it import MarkdownIt
    from rich.markdown import Heading, Markdown
    from rich.text import Text

    class LeftHeading(Heading):
        def __rich_console__(self, console: Console, options: Any) -> Any:
            yield Text.assemble((self.text.plain, "bold"), justify="left")

    class MarkdownWithLeftHeadings(Markdown):
        elements: ClassVar = {**Markdown.elements, "heading_open": LeftHeading}

    answer = MarkdownWithLeftHeadings(text, code_theme="ansi_dark", hyperlinks=False)
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").enable("strikethrough")
    answer.parsed = parser.parse(text)
    for token in answer.parsed:
        for child in token.children or ():
            child.type = "hardbreak" if child.type == "softbreak" else child.type
    return answer


def _tail(text: str, width: int) -> str:
    """The end of the text that fits into a number of cells."""
    text = printable(text)
    if cell_len(text) <= width:
        return text
    start = len(text) - max(1, width - 1)
    while cell_len(text[start:]) > width - 1:
        start += 1
    return "…" + text[start:]


def figures(stats: Stats, context: int) -> list[str]:
    """What an answer cost, as short facts."""
    facts = [f"{stats.prompt_tokens:,}+{stats.generated_tokens:,} tokens"]
    if stats.decode_tps:
        facts.append(f"{stats.decode_tps:.1f} tok/s")
    if stats.generated_tokens:
        facts.append(f"first token {seconds(stats.first_token_s)}")
    if drafted := sum(stats.drafts.drafted):
        facts.append(f"drafts {sum(stats.drafts.accepted) / drafted:.0%}")
    if stats.hits:
        facts.append("experts " + " ".join(f"{tier} {share:.0%}" for tier, share in stats.hits.items()))
    if stats.bytes_read and stats.read_s:
        facts.append(f"disk {stats.bytes_read / stats.read_s / 1e9:.2g} GB/s")
    held = min(context, stats.prompt_tokens + stats.generated_tokens)  # a last token may not have fitted
    return [*facts, f"context {held:,}/{context:,}"]
