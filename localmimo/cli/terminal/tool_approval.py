"""Tool approval: the tools of a conversation at a terminal. Each call is shown, asked about, and run within limits.

Knows tools and terminals; nothing of engines. Nothing runs without a yes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from localmimo.chat.tool_call import ToolCall
from localmimo.cli.ui import Ui, printable
from localmimo.tools.tool import DECLINED, Tool

if TYPE_CHECKING:
    from localmimo.tools.tool_file import ToolFile

Ask = Callable[[str], str | None]  # a question -> the answer, None where there is none
HIDDEN = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")  # would make a call look like another
SHOWN_LINES = 12  # of a result; the model reads all of it


class ToolApproval:
    """Files of functions that were opened, and which functions may run unasked."""

    def __init__(self, ui: Ui) -> None:
        self._ui = ui
        self.ask: Ask | None = None  # None: nobody to ask, so nothing runs
        self._files: list[ToolFile] = []
        self.tools: dict[str, Tool] = {}
        self.always: set[str] = set()

    @property
    def schemas(self) -> list[dict[str, Any]] | None:
        """The tools' schemas, for the model."""
        return [tool.schema() for tool in self.tools.values()] or None

    def open(self, path: str) -> list[Tool]:
        """Take the functions of a Python file; one of the same name is replaced. Raises BadRequest."""
        from localmimo.tools.tool_file import ToolFile

        file = ToolFile(path)
        self._files.append(file)
        for tool in file.tools:
            self.tools[tool.name] = tool
            self.always.discard(tool.name)
        return file.tools

    def clear(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()
        self._files.clear()
        self.tools.clear()
        self.always.clear()

    def run(self, calls: Sequence[ToolCall]) -> tuple[list[dict[str, Any]], bool]:
        """The results as messages, and whether to go on: not after Ctrl-C, nor where nobody could be asked."""
        results, goes_on = [], True
        for call in calls:
            text = DECLINED
            if goes_on:
                try:
                    text = self._run_one(call)
                except KeyboardInterrupt:
                    self._ui.note("  stopped; the call did not finish", style="dim")
                    text, goes_on = "error: the user stopped this call.", False
            results.append({"role": "tool", "tool_call_id": call.id, "content": text})
        return results, goes_on and (self.ask is not None or self._all_allowed(calls))

    def _run_one(self, call: ToolCall) -> str:
        self._ui.note(f"  calls {written(call)}", style="bold")
        if not self._allowed(call):
            return DECLINED
        self._ui.status.show(f"  {call.name} runs, Ctrl-C stops it ...", now=True)
        text = self.tools[call.name].call(call.arguments)
        self._ui.note(excerpt(text), style="dim")
        return text

    def _allowed(self, call: ToolCall) -> bool:
        if call.name in self.always:
            return True
        if self.ask is None:
            self._ui.note("  not run: there is no terminal to ask at", style="dim")
            return False
        answer = (self.ask(f"  run {call.name}? [y/N/always] ") or "").strip().lower()
        if answer in ("a", "always"):
            self.always.add(call.name)
            return True
        if answer not in ("y", "yes"):
            self._ui.note("  not run", style="dim")
            return False
        return True

    def _all_allowed(self, calls: Sequence[ToolCall]) -> bool:
        return all(call.name in self.always for call in calls)


def written(call: ToolCall) -> str:
    """A call as Python would write it, whole: the user must see all of what is approved."""
    arguments = [f"{name}={_value(value)}" for name, value in call.arguments.items()]
    text = HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", f"{call.name}({', '.join(arguments)})")
    return printable(text)


def _value(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        lines = value.replace("\n", "\n    ")
        return f'"""\n    {lines}"""'
    return json.dumps(value, ensure_ascii=False)


def excerpt(text: str) -> str:
    """The first lines of a result."""
    lines = text.rstrip().split("\n")
    shown = [f"  │ {printable(line)[:500]}" for line in lines[:SHOWN_LINES]]
    if len(lines) > SHOWN_LINES:
        shown.append(f"  │ … {len(lines) - SHOWN_LINES:,} more lines, all of them for the model")
    return "\n".join(shown)
