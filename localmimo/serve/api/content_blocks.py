"""Blocks: an answer cut into its parts, in order: thinking, text, calls; for the dialects that number them.

Knows steps; nothing of how a dialect writes a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from localmimo.chat.partial_call import PartialCall
from localmimo.chat.stream_parser import Kind
from localmimo.decode.steps import Step

Act = Literal["open", "more", "close"]


@dataclass(slots=True)
class ContentPart:
    """One part; `text` grows while it is open. That of a call is its arguments as JSON."""

    index: int
    kind: Kind
    text: str = ""
    id: str = ""  # of a call, like its name
    name: str = ""
    complete: bool = True  # not so: what began like a call was none, and is text further on


@dataclass(frozen=True, slots=True)
class PartChange:
    """What happened to a block; `text` is what was added to it."""

    act: Act
    block: ContentPart
    text: str = ""


@dataclass(slots=True)
class ContentParts:
    """Text of white space alone opens no block: it goes in front of the text that follows it, or nowhere.

    streamed: calls grow as they are written; else they come when they are complete.
    """

    streamed: bool
    done: list[ContentPart] = field(default_factory=list)
    _open: ContentPart | None = None
    _space: str = ""

    def push(self, step: Step) -> Iterator[PartChange]:
        """What one step changes; the last step closes what is open."""
        if (call := step.tool_call) is not None and not self.streamed:
            yield from self._call(PartialCall(call.id, call.name, call.arguments_json), ended=True)
        elif step.call_part is not None and self.streamed:
            yield from self._call(step.call_part, ended=call is not None)
        elif step.text:
            yield from self._text(step.kind, step.text)
        if step.finish_reason is not None:
            yield from self._close()

    def _call(self, part: PartialCall, ended: bool) -> Iterator[PartChange]:
        if self._open is None or self._open.id != part.id:
            yield from self._close()
            yield self._begin(
                ContentPart(len(self.done), "tool_call", id=part.id, name=part.name, complete=False)
            )
        yield self._more(part.arguments)
        if ended and self._open is not None:
            self._open.complete = True
            yield from self._close()

    def _text(self, kind: Kind, text: str) -> Iterator[PartChange]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            text, self._space = self._space + text, ""
            if not text.strip():
                self._space = text
                return
            yield self._begin(ContentPart(len(self.done), kind))
        yield self._more(text)

    def _begin(self, block: ContentPart) -> PartChange:
        self._open = block
        return PartChange("open", block)

    def _more(self, text: str) -> PartChange:
        assert self._open is not None
        self._open.text += text
        return PartChange("more", self._open, text)

    def _close(self) -> Iterator[PartChange]:
        self._space = ""
        if self._open is not None:
            self.done.append(self._open)
            yield PartChange("close", self._open)
            self._open = None
