"""KeyReader: reads the user's entries with prompt_toolkit: history, several lines, pasting, completion.

Knows keys and files' names; nothing of conversations or engines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.output.defaults import create_output

from localmimo.system.paths import home

PROMPT = "› "

Choices = Callable[[], Iterable[str]] | Literal["paths"]  # what may follow a command's name


class KeyReader:
    """The Reader of a terminal. Enter sends, Alt-Enter starts a new line, Ctrl-X Ctrl-E opens the editor."""

    def __init__(
        self,
        commands: Mapping[str, Choices],
        *,
        keys: Input | None = None,
        screen: Output | None = None,
        remember: bool = True,
    ) -> None:
        self._input, self._output = keys, screen or create_output(stdout=sys.stderr)
        self._session: PromptSession[str] = PromptSession(
            history=_history() if remember else InMemoryHistory(),
            key_bindings=_bindings(),
            completer=EntryCompleter(commands),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=lambda width, _line, _wrapped: " " * width,
            enable_open_in_editor=True,
            input=self._input,
            output=self._output,
        )

    def read(self, draft: str = "") -> str | None:
        """The next entry, begun with `draft`; None at Ctrl-D; raises KeyboardInterrupt at Ctrl-C."""
        try:
            return self._session.prompt(PROMPT, default=draft)
        except EOFError:
            return None

    def ask(self, question: str) -> str | None:
        """One line in answer to a question, not kept in the history; None at Ctrl-D."""
        asking: PromptSession[str] = PromptSession(
            history=InMemoryHistory(), input=self._input, output=self._output
        )
        try:
            return asking.prompt(question)
        except EOFError:
            return None


class EntryCompleter(Completer):
    """Completes the names of commands at the start, and after a name what it takes: paths, or one of some words."""

    def __init__(self, commands: Mapping[str, Choices]) -> None:
        self._commands = dict(sorted(commands.items()))
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            yield from _beginning_with(name, self._commands)
            return
        match self._commands.get(name):
            case None:
                return
            case "paths":
                path = argument.rpartition(" ")[2]
                yield from self._paths.get_completions(Document(path, len(path)), complete_event)
            case choices:
                yield from _beginning_with(argument, choices())


def _beginning_with(typed: str, known: Iterable[str]) -> Iterable[Completion]:
    return (Completion(word, -len(typed)) for word in known if word.startswith(typed))


def _history() -> History:
    try:
        path = home() / "history"
        path.touch(mode=0o600)
    except OSError:  # a home that cannot be written does not end the conversation
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
