"""An engine that says what a script says, and a reader that enters what a script enters."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from localmimo.chat.stream_parser import Delta, StreamParser
from localmimo.cli.ui import Ui
from localmimo.decode.steps import Stats, Step
from localmimo.errors import ContextFull

INTERRUPT = object()  # in an answer: Ctrl-C is pressed here; as an entry: at the prompt


class ScriptedEngine:
    """Answers in turn what it is given: token texts (INTERRUPT among them), or an error to raise."""

    def __init__(
        self, *answers: Sequence[Any] | Exception, think: bool = False, context: int = 32_768
    ) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
        self.context = context
        self.template = SimpleNamespace(think_default=think, name="scripted")
        self.pack = SimpleNamespace(n_bytes=171_000_000_000, name="scripted", path="/packs/scripted")
        self.plan = (
            "RAM 92.0 GB of 96.0 GB: dense 7.9 GB · kv 0.8 GB · experts 83.3 GB (6,170 of 12,032, 51%)"
        )
        self.closed = False

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def effective(self) -> dict[str, Any]:
        return {"model": "scripted", "experts": "nf4", "context": self.context}

    def encode(self, text: str) -> list[int]:
        return list(range(len(text.split())))

    def stream(
        self, messages: list[dict[str, Any]], *, cancel: Any, progress: Any, **options: Any
    ) -> Iterator[Step]:
        self.asked.append(([dict(message) for message in messages], options))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        parser = StreamParser(options.get("tools"))
        stats = Stats(prompt_tokens=sum(len(self.encode(message["content"])) for message in messages))
        progress(stats.prompt_tokens, stats.prompt_tokens)
        called = False
        for number, text in enumerate(answer):
            if text is INTERRUPT:
                signal.raise_signal(signal.SIGINT)
            if cancel.is_set():
                break
            stats = self._count(stats, number)
            for delta in parser.push(text):
                called |= delta.tool_call is not None
                yield step_of(delta, number, stats)
        for delta in parser.finish():
            called |= delta.tool_call is not None
            yield step_of(delta, None, stats)
        reason = "cancelled" if cancel.is_set() else "tool_calls" if called else "stop"
        if options["max_tokens"] is not None and len(answer) >= options["max_tokens"]:
            reason = "length"
        yield Step("", None, "answer", stats, finish_reason=reason)  # type: ignore[arg-type]

    def _count(self, stats: Stats, number: int) -> Stats:
        n = number + 1
        return Stats(
            prompt_tokens=stats.prompt_tokens,
            generated_tokens=n,
            prefill_s=9.0,
            first_token_s=9.2,
            decode_s=0.25 * number,
            pages_ram=71 * n,
            pages_disk=29 * n,
        )


def step_of(delta: Delta, token: int | None, stats: Stats) -> Step:
    return Step(delta.text, token, delta.kind, stats, tool_call=delta.tool_call, call_part=delta.part)


class ScriptedReader:
    """Enters its lines one after the other; INTERRUPT is Ctrl-C."""

    def __init__(self, *entries: Any) -> None:
        self.entries = list(entries)
        self.drafts: list[str] = []
        self.questions: list[str] = []

    def read(self, draft: str = "") -> str | None:
        self.drafts.append(draft)
        entry = self.entries.pop(0) if self.entries else None
        if entry is INTERRUPT:
            raise KeyboardInterrupt
        return entry

    def ask(self, question: str) -> str | None:
        self.questions.append(question)
        return self.read()


class Capture:
    """A Ui whose two ends can be read back."""

    def __init__(self, *, terminal: bool = False, width: int = 80, height: int = 24, **settings: Any) -> None:
        self._out = self._console(terminal, width, height)
        self._err = self._console(terminal, width, height)
        self.ui = Ui(self._out, self._err, **settings)

    @staticmethod
    def _console(terminal: bool, width: int, height: int) -> Console:
        import io

        return Console(
            file=io.StringIO(), force_terminal=terminal, width=width, height=height, no_color=True,
            highlight=False, markup=False, emoji=False, color_system=None, legacy_windows=False,
            _environ={"TERM": "xterm"},
        )  # fmt: skip

    @property
    def out(self) -> str:
        return self._out.file.getvalue()  # type: ignore[attr-defined]

    @property
    def err(self) -> str:
        return self._err.file.getvalue()  # type: ignore[attr-defined]


def full(prompt: int, context: int) -> ContextFull:
    return ContextFull(f"The prompt has {prompt:,} tokens and the context {context:,}.")
