"""What all commands share for output: two consoles, a status line that redraws itself, bars, numbers for people.

Data goes to stdout, everything else to stderr. Knows no command, no model and no torch.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from localmimo.errors import BadRequest, with_flags

if TYPE_CHECKING:
    from localmimo.engine import Engine

REDRAW_S = 0.1
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Ui:
    """The consoles of a command: `out` for data, `err` for people."""

    def __init__(self, out: Console, err: Console, *, quiet: bool = False, verbose: int = 0) -> None:
        self.out = out
        self.err = err
        self.quiet = quiet
        self.verbose = verbose
        self.status = StatusLine(err, enabled=not quiet and err.is_terminal)

    @classmethod
    def of_process(cls, *, quiet: bool = False, verbose: int = 0) -> Ui:
        out = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        err = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        return cls(out, err, quiet=quiet, verbose=verbose)

    def note(self, text: str = "", style: str | None = None) -> None:
        """A line for people; nothing with -q."""
        if not self.quiet:
            self.status.clear()
            self.err.print(text, style=style, soft_wrap=not self.err.is_terminal)

    def parts(self, parts: Iterable[str], *, indent: int = 2, style: str | None = "dim") -> None:
        """Short facts in a row, broken between facts where the terminal is narrow."""
        self.note(rows(parts, self.err.width, indent), style)

    def show_placement(self, engine: Engine) -> None:
        """How the model was placed in memory, and why not in a better one."""
        self.parts(str(engine.plan).split(" · "))
        if note := engine.effective().get("note"):
            self.note(f"  The CPU computes: {with_flags(note)}")

    def configuration(self, engine: Engine, *, always: bool = False) -> None:
        """What is in force, a line each, with -v or `always`; the plan is shown elsewhere."""
        if not self.verbose and not always:
            return
        shown = {key: value for key, value in engine.effective().items() if not isinstance(value, dict)}
        if "pack_id" in shown:
            shown["pack_id"] = str(shown["pack_id"])[:12]
        for key, value in shown.items():
            self.note(f"  {key:<14} {value}", style="dim")

    def data(self, text: str, end: str = "\n") -> None:
        """Text for stdout, as it is."""
        self.status.clear()
        self.out.file.write(text + end)
        self.out.file.flush()

    def json(self, value: Mapping[str, Any] | Sequence[Any]) -> None:
        """One JSON object, or a list, on one line of stdout."""
        self.data(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str))


class StatusLine:
    """One line on stderr that is redrawn, and cleared before anything else is printed."""

    def __init__(self, console: Console, *, enabled: bool) -> None:
        self._console = console
        self._shown = False
        self._drawn_at = 0.0
        self.enabled = enabled

    def show(self, text: str, *, now: bool = False) -> None:
        """Write over the line, at most ten times a second unless `now`."""
        if not self.enabled or (not now and time.monotonic() - self._drawn_at < REDRAW_S):
            return
        self._drawn_at = time.monotonic()
        self._shown = True
        self._console.file.write("\r" + self._dimmed(fit(text, self._console.width - 1)) + "\x1b[K")
        self._console.file.flush()

    def clear(self) -> None:
        if self._shown:
            self._console.file.write("\r\x1b[K")
            self._console.file.flush()
            self._shown = False

    def _dimmed(self, text: str) -> str:
        return text if self._console.no_color else f"\x1b[2m{text}\x1b[0m"


def fit(text: str, width: int) -> str:
    """The text cut to a number of cells, with an ellipsis where something is missing."""
    text = printable(text.replace("\n", " "))
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)) + "…"


def printable(text: str) -> str:
    """Text without the control characters that would move the cursor or recolour a terminal."""
    return _CONTROL.sub("", text)


def rows(parts: Iterable[str], width: int, indent: int = 2) -> str:
    """Parts joined by a dot, in as many rows as the width asks for."""
    margin = " " * indent
    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]} · {part}" if lines else margin + part
        if lines and cell_len(joined) > width:
            lines.append(margin + part)
        else:
            lines[-1:] = [joined]
    return "\n".join(lines)


def bar(fraction: float, width: int = 20) -> str:
    """━━━━━━╸─────, in half-cell steps."""
    halves = round(max(0.0, min(1.0, fraction)) * width * 2)
    return "━" * (halves // 2) + "╸" * (halves % 2) + "─" * (width - (halves + 1) // 2)


def seconds(value: float) -> str:
    """0.4 s, 41 s, 3 min 20 s, 2 h 05 min."""
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 99.5:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def table(head: Sequence[str], lines: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Aligned columns, the first `left` of them to the left and the numbers to the right."""
    grid = [list(head), *map(list, lines)]
    widths = [max(cell_len(line[column]) for line in grid) for column in range(len(head))]
    return "\n".join(_row(line, widths, left) for line in grid)


def _row(line: Sequence[str], widths: Sequence[int], left: int) -> str:
    cells = []
    for column, (text, width) in enumerate(zip(line, widths, strict=True)):
        gap = " " * (width - cell_len(text))
        cells.append(text + gap if column < left else gap + text)
    return (" " + "  ".join(cells)).rstrip()


def parse_count(text: str | int, name: str) -> int:
    """A count such as 4096, 32k (32,768) or 1m; raises BadRequest."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", str(text).strip().lower().replace(",", ""))
    if match is None:
        raise BadRequest(f'{name} is "{text}"; write a number such as 4096 or 32k.')
    return int(float(match[1]) * _UNITS[match[2]])
