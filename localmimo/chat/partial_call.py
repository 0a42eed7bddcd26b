"""Partial tool calls: the arguments of a call as JSON text, while the model still writes the call.

Knows MiMo's notation and the parameters' schemas; nothing of streams. The parser is given the whole text of the call
again each time it has become longer.
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
    """The next piece of the arguments' JSON. The JSON stays incomplete where the text becomes no call after all."""

    id: str
    name: str
    arguments: str


def _prefix_of(tag: str, then: str = "") -> str:
    """A pattern for every prefix of a tag, and for the whole tag followed by the pattern `then`."""
    for character in reversed(tag):
        then = f"(?:{re.escape(character)}{then})?"
    return then


KEY = re.compile(r"\s*<parameter=([^>]+)>")
# Where an unfinished value certainly ends, or where it may end, depending on the text to come.
SPACE = r"\s*"
FUNCTION_END_PREFIX = _prefix_of(FUNCTION_END, SPACE + _prefix_of(CLOSE))
AFTER_VALUE = f"{SPACE}(?:{_prefix_of(PARAMETER)}|{FUNCTION_END_PREFIX}|{_prefix_of(CLOSE)})"
VALUE_END = re.compile(
    rf"(?P<sure>{PARAMETER_END}(?={SPACE}{PARAMETER}))|(?=<){_prefix_of(PARAMETER_END, AFTER_VALUE)}\Z",
    re.DOTALL,
)


class PartialCallParser:
    """Reads the parameters of one call whose function is known.

    Only what is certain is returned: if the text becomes a call at all, the parts together are the JSON of its
    arguments. A value that is text is returned as it comes, any other value when it is complete.
    """

    def __init__(self, name: str, schemas: Schema, start: int) -> None:
        """start: where the parameters begin in the text."""
        self._id = new_id()
        self._name = name
        self._schemas = schemas
        self._json = ""  # all that was returned
        self._position = start  # the text before it is parsed
        self._value: int | None = None  # where the open parameter's value begins
        self._schema: Any = None  # of the open parameter
        self._is_string = False  # the open value is text, and its opening quote is in the JSON

    def push(self, text: str) -> PartialCall | None:
        """What has become certain with this text, which begins with the text of the last call."""
        before = len(self._json)
        while self._begin_value(text) if self._value is None else self._end_value(text):
            pass
        return self._part(before) if len(self._json) > before else None

    def end(self, call: ToolCall) -> tuple[ToolCall, PartialCall]:
        """The complete call under this id, and the last part of its arguments."""
        before, complete = len(self._json), call.arguments_json
        assert complete.startswith(self._json), f"{complete!r} does not begin with {self._json!r}"
        self._json = complete
        return replace(call, id=self._id), self._part(before)

    def _part(self, before: int) -> PartialCall:
        return PartialCall(self._id, self._name, self._json[before:])

    def _begin_value(self, text: str) -> bool:
        """Read the next parameter's tag; whether there is one."""
        match = KEY.match(text, self._position)
        if match is None:
            return False
        key = match[1].strip()
        self._json += f"{', ' if self._json else '{'}{as_json(key)}: "
        self._position = self._value = match.end()
        self._schema, self._is_string = self._schemas.get(key), False
        return True

    def _end_value(self, text: str) -> bool:
        """Read what is certain of the open parameter's value; whether the value ends."""
        assert self._value is not None
        found = VALUE_END.search(text, self._position)
        end = found.start() if found else len(text)
        if not self._is_string and is_text(self._schema, text[self._value : end]):
            self._json += '"'
            self._is_string, self._position = True, self._value
        if self._is_string:
            self._json += as_json(text[self._position : end])[1:-1]
        self._position = end
        if found is None or found["sure"] is None:
            return False
        self._json += '"' if self._is_string else as_json(typed(text[self._value : end], self._schema))
        self._position, self._value = end + len(PARAMETER_END), None
        return True
