"""StreamParser: token text becomes thinking, answer and tool calls.

Pure text: knows nothing of token ids, of templates, of the model or of the terminal.
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
    """A piece of what the model says. `text` is to be shown; `raw` is what it wrote, tags included.

    A tool call comes in parts, without text, as soon as its first parameter has begun; the delta that ends it has
    `tool_call` set, and `text` is the call as written. A call that never ends or cannot be read is text after all.
    """

    kind: Kind
    text: str
    tool_call: ToolCall | None = None
    raw: str = ""
    part: PartialCall | None = None


class StreamParser:
    """Splits token text into thinking, answer and tool calls, however the text is cut into pieces.

    thinking: the prompt ended inside an open <think> block. (MiMo's own templates never do: there the model
    writes <think> itself, which is recognised at the start of its answer.)

    A call to a function that is not among the tools, or one that cannot be read, stays text where it stands.
    A call that can be read ends an open <think> block. The `raw` of all deltas together is the text pushed.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None, thinking: bool = False) -> None:
        self._functions = functions_of(tools)
        self._kind: Kind = "thinking" if thinking else "answer"
        self._fresh = True  # only white space since the start, a </think> or a call: here a <think> is a tag
        self._implied = False  # a call ended the thinking; its </think> may still come
        self._held = ""  # not decided yet
        self._searched = 0  # how far _held was searched for the end of a call
        self._growing: PartialCallParser | None = None  # the call that _held begins with

    def push(self, text: str) -> list[Delta]:
        """The deltas that have become certain with this text."""
        self._held += text
        return _merge(self._decide(final=False))

    def finish(self) -> list[Delta]:
        """What was still held back, the text being at its end."""
        return _merge(self._decide(final=True))

    def _decide(self, final: bool) -> Iterable[Delta]:
        while self._held and (delta := self._next(final)) is not None:
            yield delta

    def _next(self, final: bool) -> Delta | None:
        if self._functions and self._held.startswith(OPEN):
            return self._call(final)
        if self._fresh and self._held[0].isspace():
            return self._text(len(self._held) - len(self._held.lstrip()))
        tags = self._tags()
        for tag in tags:
            if self._held.startswith(tag) and tag != OPEN:
                return self._turn(tag)
        return self._plain(tags, final)

    def _tags(self) -> list[str]:
        tags = [OPEN] if self._functions else []
        if self._kind == "thinking" or self._implied:
            tags.append(THINK_END)
        if self._fresh:
            tags.append(THINK)
        return tags

    def _turn(self, tag: str) -> Delta:
        self._kind = "thinking" if tag == THINK else "answer"
        self._implied = False
        # A repeated <think> right at the start of the thinking is not text either; a third one is.
        self._fresh = tag == THINK_END
        return self._take(len(tag), "thinking", shown=False)

    def _plain(self, tags: Sequence[str], final: bool) -> Delta | None:
        """Text up to the next tag; without one, all but an end that may be the start of a tag."""
        later = [tag for tag in tags if tag != THINK]  # a <think> counts only where the text starts
        starts = [at for tag in later if (at := self._held.find(tag)) >= 0]
        if starts:
            return self._text(min(starts))
        if final:
            return self._text(len(self._held))
        if self._fresh and THINK.startswith(self._held):
            return None
        kept = max((_overlap(self._held, tag) for tag in later), default=0)
        return self._text(len(self._held) - kept) if kept < len(self._held) else None

    def _text(self, n_chars: int) -> Delta:
        delta = self._take(n_chars, self._kind)
        self._fresh = self._fresh and delta.raw.isspace()
        return delta

    def _take(self, n_chars: int, kind: Kind, shown: bool = True) -> Delta:
        raw, self._held = self._held[:n_chars], self._held[n_chars:]
        self._searched, self._growing = 0, None
        return Delta(kind, raw if shown else "", raw=raw)

    def _call(self, final: bool) -> Delta | None:
        head = HEAD.match(self._held)
        if head is None:
            return None if not final and self._may_be_call() else self._text(len(OPEN))
        body = _skip_space(self._held, head.end())
        name = head[1].strip()
        if name not in self._functions or not _may_go_on(self._held[body : body + len(PARAMETER)]):
            return self._text(len(OPEN))
        growing = self._growing = self._growing or PartialCallParser(name, self._functions[name], head.end())
        while (at := self._held.find(CLOSE, self._searched)) >= 0:
            self._searched = at + len(CLOSE)
            ended = _follows(self._held, at, FUNCTION_END)
            # Anything else before the tag is a value that speaks of it.
            whole = ended or at == body or _follows(self._held, at, PARAMETER_END)
            if whole and (call := parse_call(self._held[: self._searched], self._functions)):
                return self._called(growing, call)
            if ended:
                return self._text(len(OPEN))
        self._searched = max(self._searched, len(self._held) - len(CLOSE) + 1)
        if final:
            return self._unfinished_call(growing)
        part = growing.push(self._held)
        return Delta("tool_call", "", part=part) if part else None

    def _unfinished_call(self, growing: PartialCallParser) -> Delta:
        """At the end a call that lacks only its last tag counts; one that was cut off does not."""
        ended = self._held.rstrip().endswith(FUNCTION_END)
        call = parse_call(self._held, self._functions) if ended else None
        return self._called(growing, call) if call else self._text(len(OPEN))

    def _may_be_call(self) -> bool:
        rest = self._held[len(OPEN) :].lstrip()
        if not rest.startswith(FUNCTION):
            return FUNCTION.startswith(rest)
        name = rest[len(FUNCTION) :].strip()
        return any(known.startswith(name) for known in self._functions)

    def _called(self, growing: PartialCallParser, call: ToolCall) -> Delta:
        self._implied = self._implied or self._kind == "thinking"
        self._kind, self._fresh = "answer", True
        self._take(len(call.text), "tool_call")
        call, part = growing.end(call)
        return Delta("tool_call", call.text, call, call.text, part)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _follows(text: str, at: int, tag: str) -> bool:
    """Whether the tag stands before this place, but for white space."""
    while at and text[at - 1].isspace():
        at -= 1
    return text.endswith(tag, 0, at)


def _may_go_on(text: str) -> bool:
    """Whether a call's body may start like this; the text may stop within a tag."""
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
    said = {
        kind: "".join(delta.text for delta in deltas if delta.kind == kind) for kind in ("answer", "thinking")
    }
    return said["answer"], said["thinking"], [delta.tool_call for delta in deltas if delta.tool_call]
