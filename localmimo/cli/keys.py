"""KeyReader: reads the user's entries with prompt_toolkit: history, several lines, pasting, completion.

Knows keys and files' names; nothing of conversations or engines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.output.defaults import create_output

from localmimo.home import home

PROMPT = "› "


class KeyReader:
    """The Reader of a terminal. Enter sends, Alt-Enter starts a new line, Ctrl-X Ctrl-E opens the editor."""

    def __init__(
        self,
        commands: Iterable[str],
        *,
        keys: Input | None = None,
        screen: Output | None = None,
        remember: bool = True,
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history() if remember else InMemoryHistory(),
            key_bindings=_bindings(),
            completer=EntryCompleter(commands),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=lambda width, _line, _wrapped: " " * width,
            enable_open_in_editor=True,
            input=keys,
            output=screen or create_output(stdout=sys.stderr),
        )

    def read(self) -> str | None:
        """The next entry, None at Ctrl-D; raises KeyboardInterrupt at Ctrl-C."""
        try:
            return self._session.prompt(PROMPT)
        except EOFError:
            return None


class EntryCompleter(Completer):
    """Completes the names of commands at the start, and paths after /read."""

    def __init__(self, commands: Iterable[str]) -> None:
        self._commands = sorted(commands)
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            yield from (Completion(known, -len(name)) for known in self._commands if known.startswith(name))
        elif name == "read":
            path = argument.rpartition(" ")[2]
            yield from self._paths.get_completions(Document(path, len(path)), complete_event)


def _history() -> History:
    try:
        path = home() / "history"
        path.touch(mode=0o600)
    except OSError:  # a home that cannot be written is no reason not to talk
        return InMemoryHistory()
    return FileHistory(str(path))


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
