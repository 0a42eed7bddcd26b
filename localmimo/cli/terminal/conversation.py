"""Conversation: questions and answers at a terminal, as a function of a reader, a user interface and an engine.

Knows nothing of keys (keys.py), of commands (slash_commands.py), of how answers look (screen.py) or of how an engine is
loaded.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from localmimo.cli.terminal.screen import Screen, figures
from localmimo.cli.terminal.tool_approval import ToolApproval
from localmimo.cli.ui import Ui
from localmimo.errors import Cancelled, ContextFull, LocalMimoError, with_flags

if TYPE_CHECKING:
    from localmimo.cli.terminal.step_log import StepLog
    from localmimo.decode.answer import Answer
    from localmimo.decode.grammar import Grammar
    from localmimo.engine import Engine


MAX_ROUNDS = 50  # of calls after one question


class EntryReader(Protocol):
    """Where the user's lines come from."""

    def read(self, draft: str = "") -> str | None:
        """The next entry, begun with `draft`; None at the end; raises KeyboardInterrupt at Ctrl-C."""

    def ask(self, question: str) -> str | None:
        """One line in answer to a question, not kept in the history; None at the end."""


@dataclass(slots=True)
class ChatSettings:
    """How to answer: what flags and /set say."""

    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    think: bool | None = None
    think_budget: int | None = None
    stats: bool = True
    grammar: Grammar | None = None
    log: StepLog | None = None

    def stream_options(self) -> dict[str, Any]:
        """Keyword arguments of Engine.stream; raises BadRequest where a value makes no sense."""
        from localmimo.decode.options import Sampling

        chosen = {key: value for key, value in self.sampling.items() if value is not None}
        return {
            "sampling": Sampling(**chosen),
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "think": self.think,
            "think_budget": self.think_budget,
        } | ({} if self.grammar is None else {"grammar": self.grammar})


def answer(
    engine: Engine,
    messages: list[dict[str, Any]],
    settings: ChatSettings,
    screen: Screen,
    tools: list[dict[str, Any]] | None = None,
) -> Answer:
    """Let the engine answer and show it; Ctrl-C stops it and keeps what there is."""
    from localmimo.decode.answer import Answer

    turn, cancel = Answer(), threading.Event()
    options = settings.stream_options()
    try:
        screen.begin()
        if settings.log is not None:
            settings.log.begin()
        with stopping(cancel):
            for step in engine.stream(
                messages, cancel=cancel, progress=screen.reading, tools=tools, **options
            ):
                turn.add(step)
                screen.show(step)
                if settings.log is not None:
                    settings.log.add(step)
    except (KeyboardInterrupt, Cancelled):
        turn.finish_reason = "cancelled"
    finally:
        screen.end()
    return turn


def run_turns(
    engine: Engine,
    messages: list[dict[str, Any]],
    settings: ChatSettings,
    screen: Screen,
    tool_approval: ToolApproval,
    system: str | None,
) -> Iterator[Answer]:
    """Answers to the last message, another one after each round of tool calls; `messages` grows."""
    head = [{"role": "system", "content": system}] if system else []
    for _ in range(MAX_ROUNDS):
        turn = answer(engine, [*head, *messages], settings, screen, tool_approval.schemas)
        if turn.tokens or turn.finish_reason != "cancelled":
            messages.append(turn.message().as_dict())
        yield turn
        if turn.finish_reason != "tool_calls":
            return
        results, goes_on = tool_approval.run(turn.tool_calls)
        messages += results
        if not goes_on:
            return


@contextmanager
def stopping(cancel: threading.Event) -> Iterator[None]:
    """The first Ctrl-C sets `cancel`, the second raises KeyboardInterrupt."""

    def stop(_signal: int, _frame: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Conversation:
    """The messages and settings of a conversation; puts a question and shows the answer."""

    def __init__(
        self,
        reader: EntryReader,
        ui: Ui,
        engine: Engine,
        *,
        settings: ChatSettings,
        screen: Screen,
        system: str | None = None,
        tool_approval: ToolApproval | None = None,
    ) -> None:
        self.reader = reader
        self.ui = ui
        self.engine = engine
        self.settings = settings
        self.screen = screen
        self.system = system
        self.tool_approval = tool_approval or ToolApproval(ui)
        self.tool_approval.ask = reader.ask
        self.messages: list[dict[str, Any]] = []  # without the system prompt
        self.attached: list[str] = []  # files that go with the next message
        self.last_question = ""  # the last question, for /retry
        self.draft = ""  # text that the next prompt starts with, for /edit
        self.name = ""  # of the saved session that this is
        self.last: Answer | None = None

    def ask(self, text: str) -> None:
        """Put a question, show the answer, keep both; a question without any answer is removed."""
        self.last_question = "\n\n".join([*self.attached, text])
        self.messages.append({"role": "user", "content": self.last_question})
        before = len(self.messages)
        try:
            for turn in run_turns(
                self.engine, self.messages, self.settings, self.screen, self.tool_approval, self.system
            ):
                self.attached.clear()
                self._close(turn)
        except LocalMimoError as error:
            hint = " /undo or /clear makes room." if isinstance(error, ContextFull) and before > 1 else ""
            self.ui.note(f"error: {with_flags(error)}{hint}", style="red")
        if len(self.messages) == before:
            self.messages.pop()

    def take_back(self) -> str | None:
        """Remove the last question and what followed it; the question."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return str(message["content"])
        return None

    def _close(self, turn: Answer) -> None:
        if turn.finish_reason == "cancelled" and not turn.tokens:
            self.ui.note("  stopped before the first word; /retry asks again", style="dim")
            return
        self.last = turn
        show_summary(turn, self.engine.context, self.settings, self.ui)
        if self.ui.err.is_terminal:
            self.ui.note()


def show_summary(turn: Answer, context: int, settings: ChatSettings, ui: Ui) -> None:
    """Below an answer: why it is not whole, and its figures."""
    ending = ending_of(turn, context)
    facts = figures(turn.stats, context) if turn.stats and settings.stats else []
    if ending or facts:
        ui.parts([*([ending] if ending else []), *facts])


def ending_of(turn: Answer, context: int) -> str:
    """Why the answer is not whole, or nothing."""
    match turn.finish_reason:
        case "cancelled":
            return "stopped"
        case "length":
            return "cut at --max-tokens"
        case "context":
            return f"the context of {context:,} tokens is full"
    return ""
