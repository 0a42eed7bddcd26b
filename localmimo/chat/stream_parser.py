"""Parser of an answer while it is generated: its text becomes thinking, answer and tool calls.

Knows text only; nothing of token ids, templates, the model or the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from localmimo.chat.partial_call import PartialCall, PartialCallParser
from localmimo.chat.tool_call import (
    CLOSE,
    FUNCTION,
    FUNCTION_END,
    HEAD,
    OPEN,
    PARAMETER,
    PARAMETER_END,
    ToolCall,
    functions_of,
    parse_call,
)

__all__ = ["Delta", "StreamParser", "ToolCall", "parse_message"]

Kind = Literal["thinking", "answer", "tool_call"]

THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. `text` is what to show; `raw` is what the model wrote, tags included.

    A tool call comes in parts, without text, as soon as its first parameter has begun. The delta that ends it has
    `tool_call` set, and its `text` is the call as written. A call that never ends or cannot be read becomes text.
    """

    kind: Kind
    text: str
    tool_call: ToolCall | None = None
    raw: str = ""
    part: PartialCall | None = None


class StreamParser:
    """Splits an answer into thinking, answer and tool calls, in the same way however the text is cut into pieces.

    thinking: the prompt ended inside an open <think> block. (MiMo's own templates never do that: there the model
    writes <think> itself, which is recognised at the start of its answer.)

    A call to a function that is not among the tools, or one that cannot be read, stays text in its place.
    A call that can be read ends an open <think> block. The `raw` of all deltas together is the text pushed.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None, thinking: bool = False) -> None:
        self._functions = functions_of(tools)
        self._kind: Kind = "thinking" if thinking else "answer"
        # Only white space came since the start, since a </think> or since a call: a <think> now is a tag.
        self._at_start = True
        self._think_end_may_come = False  # a call ended the thinking; its </think> may still follow
        self._pending = ""  # text that is not returned yet
        self._searched = 0  # how much of the pending text was searched for the end of a call
        self._partial_call: PartialCallParser | None = None  # of the call that the pending text begins with

    def push(self, text: str) -> list[Delta]:
        """The deltas that have become certain with this text."""
        self._pending += text
        return _merge(self._deltas(final=False))

    def finish(self) -> list[Delta]:
        """The deltas of the pending text, at the end of the answer."""
        return _merge(self._deltas(final=True))

    @property
    def thinking(self) -> bool:
        """Whether the text pushed so far ends inside a <think> block."""
        return self._kind == "thinking"

    @property
    def in_call(self) -> bool:
        """Whether it ends inside what is a call or may become one."""
        return bool(self._functions) and self._pending.startswith(OPEN)

    def _deltas(self, final: bool) -> Iterable[Delta]:
        while self._pending and (delta := self._next(final)) is not None:
            yield delta

    def _next(self, final: bool) -> Delta | None:
        """The next delta, or None where it depends on the text to come."""
        if self._functions and self._pending.startswith(OPEN):
            return self._call(final)
        if self._at_start and self._pending[0].isspace():
            return self._text(len(self._pending) - len(self._pending.lstrip()))
        tags = self._tags()
        for tag in tags:
            if self._pending.startswith(tag) and tag != OPEN:
                return self._think_tag(tag)
        return self._plain(tags, final)

    def _tags(self) -> list[str]:
        """The tags that count at this point."""
        tags = [OPEN] if self._functions else []
        if self._kind == "thinking" or self._think_end_may_come:
            tags.append(THINK_END)
        if self._at_start:
            tags.append(THINK)
        return tags

    def _think_tag(self, tag: str) -> Delta:
        self._kind = "thinking" if tag == THINK else "answer"
        self._think_end_may_come = False
        # A repeated <think> right at the start of the thinking is not text either; a third one is.
        self._at_start = tag == THINK_END
        return self._take(len(tag), "thinking", shown=False)

    def _plain(self, tags: Sequence[str], final: bool) -> Delta | None:
        """Text up to the next tag; without one, all but an end that may be the start of a tag."""
        later = [tag for tag in tags if tag != THINK]  # a <think> counts only where the text starts
        starts = [start for tag in later if (start := self._pending.find(tag)) >= 0]
        if starts:
            return self._text(min(starts))
        if final:
            return self._text(len(self._pending))
        if self._at_start and THINK.startswith(self._pending):
            return None
        n_unsure = max((_overlap(self._pending, tag) for tag in later), default=0)
        return self._text(len(self._pending) - n_unsure) if n_unsure < len(self._pending) else None

    def _text(self, n_chars: int) -> Delta:
        delta = self._take(n_chars, self._kind)
        self._at_start = self._at_start and delta.raw.isspace()
        return delta

    def _take(self, n_chars: int, kind: Kind, shown: bool = True) -> Delta:
        raw, self._pending = self._pending[:n_chars], self._pending[n_chars:]
        self._searched, self._partial_call = 0, None
        return Delta(kind, raw if shown else "", raw=raw)

    def _call(self, final: bool) -> Delta | None:
        """The call that the pending text begins with, a part of it, or its tag as text where it is no call."""
        head = HEAD.match(self._pending)
        if head is None:
            return None if not final and self._may_be_call() else self._text(len(OPEN))
        body = _skip_space(self._pending, head.end())
        name = head[1].strip()
        if name not in self._functions or not _may_be_body(self._pending[body : body + len(PARAMETER)]):
            return self._text(len(OPEN))
        if self._partial_call is None:
            self._partial_call = PartialCallParser(name, self._functions[name], head.end())
        partial = self._partial_call
        while (close := self._pending.find(CLOSE, self._searched)) >= 0:
            self._searched = close + len(CLOSE)
            function_ended = _follows(self._pending, close, FUNCTION_END)
            # Behind anything else, the closing tag is part of a parameter's value.
            ended = function_ended or close == body or _follows(self._pending, close, PARAMETER_END)
            if ended and (call := parse_call(self._pending[: self._searched], self._functions)):
                return self._complete_call(partial, call)
            if function_ended:
                return self._text(len(OPEN))
        self._searched = max(self._searched, len(self._pending) - len(CLOSE) + 1)
        if final:
            return self._unfinished_call(partial)
        part = partial.push(self._pending)
        return Delta("tool_call", "", part=part) if part else None

    def _unfinished_call(self, partial: PartialCallParser) -> Delta:
        """At the end, a call that lacks only its last tag counts; one that was cut off earlier does not."""
        function_ended = self._pending.rstrip().endswith(FUNCTION_END)
        call = parse_call(self._pending, self._functions) if function_ended else None
        return self._complete_call(partial, call) if call else self._text(len(OPEN))

    def _may_be_call(self) -> bool:
        rest = self._pending[len(OPEN) :].lstrip()
        if not rest.startswith(FUNCTION):
            return FUNCTION.startswith(rest)
        name = rest[len(FUNCTION) :].strip()
        return any(known.startswith(name) for known in self._functions)

    def _complete_call(self, partial: PartialCallParser, call: ToolCall) -> Delta:
        self._think_end_may_come = self._think_end_may_come or self._kind == "thinking"
        self._kind, self._at_start = "answer", True
        self._take(len(call.text), "tool_call")
        call, part = partial.end(call)
        return Delta("tool_call", call.text, call, call.text, part)


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _follows(text: str, position: int, tag: str) -> bool:
    """Whether the tag is right before this position, white space aside."""
    while position and text[position - 1].isspace():
        position -= 1
    return text.endswith(tag, 0, position)


def _may_be_body(text: str) -> bool:
    """Whether a call's body may start like this. The text may stop within a tag."""
    return any(tag.startswith(text) or text.startswith(tag) for tag in (PARAMETER, FUNCTION_END, CLOSE))


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the start of the tag."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def _merge(deltas: Iterable[Delta]) -> list[Delta]:
    merged: list[Delta] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        if last and last.kind == delta.kind != "tool_call":
            merged[-1] = Delta(last.kind, last.text + delta.text, raw=last.raw + delta.raw)
        else:
            merged.append(delta)
    return merged


def parse_message(
    text: str, tools: Sequence[Mapping[str, Any]] | None = None, thinking: bool = False
) -> tuple[str, str, list[ToolCall]]:
    """(content, reasoning, tool calls) of a complete answer."""
    parser = StreamParser(tools, thinking)
    deltas = [*parser.push(text), *parser.finish()]
    content, reasoning = (
        "".join(delta.text for delta in deltas if delta.kind == kind) for kind in ("answer", "thinking")
    )
    return content, reasoning, [delta.tool_call for delta in deltas if delta.tool_call]
