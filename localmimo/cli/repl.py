"""Repl: a conversation at a terminal, as a function of a reader, a user interface and an engine.

Knows nothing of keys (keys.py reads them), of how answers look (screen.py) or of how an engine is loaded.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from localmimo.cli.screen import Screen, figures
from localmimo.cli.ui import Ui
from localmimo.errors import Cancelled, ContextFull, LocalMimoError

if TYPE_CHECKING:
    from localmimo.chat import ToolCall
    from localmimo.engine import Engine
    from localmimo.generate import FinishReason, Stats


class Reader(Protocol):
    """Where the user's lines come from."""

    def read(self) -> str | None:
        """The next entry, None at the end; raises KeyboardInterrupt at Ctrl-C."""


@dataclass(slots=True)
class Manner:
    """How to answer: what flags and /set say."""

    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    think: bool | None = None
    think_budget: int | None = None
    stats: bool = True

    def stream_options(self) -> dict[str, Any]:
        """Keyword arguments of Engine.stream; raises BadRequest where a value makes no sense."""
        from localmimo.sample import Sampling

        chosen = {key: value for key, value in self.sampling.items() if value is not None}
        return {
            "sampling": Sampling(**chosen),
            "max_tokens": self.max_tokens,
            "think": self.think,
            "think_budget": self.think_budget,
        }


@dataclass(slots=True)
class Turn:
    """An answer as far as it came."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "cancelled"
    stats: Stats | None = None

    def message(self) -> dict[str, Any]:
        """The turn as it goes back into the conversation: the reasoning travels along."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return message


def answer(engine: Engine, messages: list[dict[str, Any]], manner: Manner, screen: Screen) -> Turn:
    """Let the engine answer and show it; Ctrl-C stops it and keeps what there is."""
    turn, cancel = Turn(), threading.Event()
    options = manner.stream_options()
    screen.begin()
    try:
        with stopping(cancel):
            for step in engine.stream(messages, cancel=cancel, progress=screen.reading, **options):
                _collect(turn, step)
                screen.show(step)
    except (KeyboardInterrupt, Cancelled):
        turn.finish_reason = "cancelled"
    finally:
        screen.end()
    return turn


def _collect(turn: Turn, step: Any) -> None:
    turn.stats = step.stats
    if step.token is not None:
        turn.tokens.append(step.token)
    if step.tool_call is not None:
        turn.tool_calls.append(step.tool_call)
    elif step.kind == "thinking":
        turn.reasoning += step.text
    else:
        turn.content += step.text
    if step.finish_reason is not None:
        turn.finish_reason = step.finish_reason


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


class Repl:
    """One conversation: its messages, its manner, and the loop that reads and answers."""

    def __init__(
        self,
        reader: Reader,
        ui: Ui,
        engine: Engine,
        *,
        manner: Manner,
        screen: Screen,
        system: str | None = None,
    ) -> None:
        self.reader = reader
        self.ui = ui
        self.engine = engine
        self.manner = manner
        self.screen = screen
        self.system = system
        self.messages: list[dict[str, Any]] = []  # without the system prompt
        self.attached: list[str] = []  # files that go with the next message
        self.asked = ""  # the last question, for /retry
        self.last: Turn | None = None

    def run(self) -> None:
        """Read and answer until the end of the input or /exit."""
        from localmimo.cli.commands import obey

        interrupts = 0
        while True:
            try:
                entry = self.reader.read()
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts > 1:
                    self.ui.note("Ctrl-D or /exit leaves.", style="dim")
                continue
            interrupts = 0
            if entry is None:
                return
            if entry.startswith("/") and not entry.startswith("//"):
                if not obey(self, entry):
                    return
            elif entry.strip():
                self.ask(entry[1:] if entry.startswith("//") else entry)

    def ask(self, text: str) -> None:
        """Put a question, show the answer, keep both; a question that got no answer at all is taken back."""
        self.asked = "\n\n".join([*self.attached, text])
        self.messages.append({"role": "user", "content": self.asked})
        try:
            turn = answer(self.engine, self.prompt(), self.manner, self.screen)
        except LocalMimoError as error:
            self.messages.pop()
            room = " /undo or /clear makes room." if isinstance(error, ContextFull) and self.messages else ""
            self.ui.note(f"error: {error}{room}", style="red")
            return
        self.attached.clear()
        if turn.tokens or turn.finish_reason != "cancelled":
            self.messages.append(turn.message())
            self.last = turn
        else:
            self.messages.pop()
        self._close(turn)

    def prompt(self) -> list[dict[str, Any]]:
        """The messages with the system prompt before them."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def take_back(self) -> bool:
        """Remove the last question and its answer."""
        while self.messages:
            if self.messages.pop()["role"] == "user":
                return True
        return False

    def _close(self, turn: Turn) -> None:
        if turn.finish_reason == "cancelled" and not turn.tokens:
            self.ui.note("  stopped before the first word; /retry asks again", style="dim")
            return
        ending = ending_of(turn, self.engine.context)
        facts = figures(turn.stats, self.engine.context) if turn.stats and self.manner.stats else []
        if ending or facts:
            self.ui.parts([*([ending] if ending else []), *facts])
        if self.ui.err.is_terminal:
            self.ui.note()


def ending_of(turn: Turn, context: int) -> str:
    """Why the answer is not whole, or nothing."""
    match turn.finish_reason:
        case "cancelled":
            return "stopped"
        case "length":
            return "cut at --max-tokens"
        case "context":
            return f"the context of {context:,} tokens is full"
    return ""
