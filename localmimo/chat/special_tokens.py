"""Marks: keeps text that merely spells a special token from becoming one.

A mark is a Unicode noncharacter, put behind the first letter of the spelling before a template is filled in; the
tokenizer takes it out and encodes what surrounds it as plain text. Knows spellings; nothing of ids or templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localmimo.errors import BadRequest

MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # for internal use, says Unicode; the first unused one


@dataclass(frozen=True, slots=True)
class EscapedMessages:
    """Messages and tools in which every spelling is broken by `mark`."""

    mark: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


class SpecialTokenEscaper:
    """Marks what people, tools and clients wrote.

    added: the spellings of all the tokens that are no ordinary text; control: of those that only the template
    may write. An assistant's turn is text of the model, which writes <think> and <tool_call> itself.
    """

    def __init__(self, added: Iterable[str], control: Iterable[str]) -> None:
        self._added = _any_of(added)
        self._control = _any_of(control)

    def mark(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> EscapedMessages:
        """Checked messages and tools, marked; raises BadRequest."""
        mark = _unused(messages, tools)
        marked = [
            {
                key: value if key == "role" else _walk(value, self._breaker(message["role"], mark))
                for key, value in message.items()
            }
            for message in messages
        ]
        return EscapedMessages(mark, marked, _walk(tools, self._breaker("tool", mark)))

    def _breaker(self, role: str, mark: str) -> Callable[[str], str]:
        spelled = self._control if role == "assistant" else self._added
        if spelled is None:
            return lambda text: text
        return lambda text: spelled.sub(lambda match: match[0][0] + mark + match[0][1:], text)


def _any_of(spellings: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted({text for text in spellings if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _unused(*values: Any) -> str:
    try:
        text = json.dumps(values, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"The messages and tools must be JSON values ({error}).") from None
    for mark in MARKS:
        if mark not in text:
            return mark
    raise BadRequest("The messages use all of Unicode's 32 noncharacters U+FDD0 to U+FDEF; leave one out.")


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    match value:
        case str():
            return change(value)
        case Mapping():
            return {change(str(key)): _walk(entry, change) for key, entry in value.items()}
        case list() | tuple():
            return [_walk(entry, change) for entry in value]
    return value
