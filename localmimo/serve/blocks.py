"""Blocks: an answer cut into its parts, in order: thinking, text, calls; for the dialects that number them.

Knows steps; nothing of how a dialect writes a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from localmimo.chat import Kind, ToolCall
from localmimo.generate import Step

Act = Literal["open", "more", "close"]


@dataclass(slots=True)
class Block:
    """One part; `text` grows while it is open. A call comes whole."""

    index: int
    kind: Kind
    text: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a block; `text` is what was added to it."""

    act: Act
    block: Block
    text: str = ""


@dataclass(slots=True)
class Blocks:
    """Text of white space alone opens no block: it goes in front of the text that follows it, or nowhere."""

    done: list[Block] = field(default_factory=list)
    _open: Block | None = None
    _space: str = ""

    def push(self, step: Step) -> Iterator[Change]:
        """What one step changes; the last step closes what is open."""
        if step.tool_call is not None:
            yield from self._close()
            yield self._begin("tool_call", step.tool_call)
            yield from self._close()
        elif step.text:
            yield from self._text(step.kind, step.text)
        if step.finish_reason is not None:
            yield from self._close()

    def _text(self, kind: Kind, text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            text, self._space = self._space + text, ""
            if not text.strip():
                self._space = text
                return
            yield self._begin(kind)
        assert self._open is not None
        self._open.text += text
        yield Change("more", self._open, text)

    def _begin(self, kind: Kind, call: ToolCall | None = None) -> Change:
        self._open = Block(len(self.done), kind, call=call)
        return Change("open", self._open)

    def _close(self) -> Iterator[Change]:
        self._space = ""
        if self._open is not None:
            self.done.append(self._open)
            yield Change("close", self._open)
            self._open = None
