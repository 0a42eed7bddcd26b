"""PartialCall: what a call that is still being written adds to its arguments as JSON text; Growing makes them.

Knows MiMo's notation and the parameters' schemas; nothing of streams: it is shown the same text again, grown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from localmimo.chat.tool_call import (
    CLOSE,
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
    Schema,
    ToolCall,
    as_json,
    is_text,
    new_id,
    typed,
)


@dataclass(frozen=True, slots=True)
class PartialCall:
    """A piece of the arguments. Where the text turns out to be no call after all, the JSON stays without its end."""

    id: str
    name: str
    arguments: str


def _begun(tag: str, then: str = "") -> str:
    """A pattern for every beginning of a tag, and for the whole of it with what may come behind."""
    for character in reversed(tag):
        then = f"(?:{re.escape(character)}{then})?"
    return then


KEY = re.compile(r"\s*<parameter=([^>]+)>")
# Where a value that is being written ends for sure, or may turn out to end once more of the text is there.
SPACE = r"\s*"
AFTER = f"{SPACE}(?:{_begun(PARAMETER)}|{_begun(FUNCTION_END, SPACE + _begun(CLOSE))}|{_begun(CLOSE)})"
VALUE_END = re.compile(
    rf"(?P<sure>{PARAMETER_END}(?={SPACE}{PARAMETER}))|(?=<){_begun(PARAMETER_END, AFTER)}\Z", re.DOTALL
)


class PartialCallParser:
    """A call whose function is known and whose parameters are being written.

    Only what is certain is given out: if the text becomes a call at all, the parts together are the JSON of its
    arguments. Text grows letter by letter; another value comes when it is complete, and the end with the call.
    """

    def __init__(self, name: str, schemas: Schema, start: int) -> None:
        """start: where the parameters begin in the text."""
        self._id = new_id()
        self._name = name
        self._schemas = schemas
        self._written = ""  # what was given out
        self._at = start  # what is before was dealt with
        self._value: int | None = None  # where the open parameter's value begins
        self._schema: Any = None  # of the open parameter
        self._quoted = False  # its value is given out letter by letter

    def push(self, text: str) -> PartialCall | None:
        """What is certain now, the text having grown to this one."""
        before = len(self._written)
        while self._begin_value(text) if self._value is None else self._end_value(text):
            pass
        return self._part(before) if len(self._written) > before else None

    def end(self, call: ToolCall) -> tuple[ToolCall, PartialCall]:
        """The call that it became, and the part that was missing."""
        before, whole = len(self._written), call.arguments_json
        assert whole.startswith(self._written), f"{whole!r} was begun as {self._written!r}"
        self._written = whole
        return replace(call, id=self._id), self._part(before)

    def _part(self, before: int) -> PartialCall:
        return PartialCall(self._id, self._name, self._written[before:])

    def _begin_value(self, text: str) -> bool:
        """Whether a parameter's value begins."""
        match = KEY.match(text, self._at)
        if match is None:
            return False
        key = match[1].strip()
        self._written += f"{', ' if self._written else '{'}{as_json(key)}: "
        self._at = self._value = match.end()
        self._schema, self._quoted = self._schemas.get(key), False
        return True

    def _end_value(self, text: str) -> bool:
        """Whether the open parameter's value ends; takes what is certain of it."""
        assert self._value is not None
        found = VALUE_END.search(text, self._at)
        end = found.start() if found else len(text)
        if not self._quoted and is_text(self._schema, text[self._value : end]):
            self._written += '"'
            self._quoted, self._at = True, self._value
        if self._quoted:
            self._written += as_json(text[self._at : end])[1:-1]
        self._at = end
        if found is None or found["sure"] is None:
            return False
        self._written += '"' if self._quoted else as_json(typed(text[self._value : end], self._schema))
        self._at, self._value = end + len(PARAMETER_END), None
        return True
