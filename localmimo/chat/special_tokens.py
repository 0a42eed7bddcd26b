"""Escaping of special tokens: text that merely spells one stays text.

An escape is a Unicode noncharacter. It is put behind the first character of each spelling before the template is
rendered; the tokenizer removes it and encodes the text around it as plain text. Knows spellings; nothing of ids or
templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localmimo.errors import BadRequest

ESCAPES = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode leaves these to a program's internal use


@dataclass(frozen=True, slots=True)
class EscapedMessages:
    """Messages and tools in which the character `escape` breaks every spelling. It occurs nowhere else."""

    escape: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


class SpecialTokenEscaper:
    """Escapes what users, tools and clients wrote.

    added: the spellings of all tokens that are not ordinary text. control: the spellings of those that only the
    template may write. In an assistant's message only the control tokens are escaped: the model writes <think> and
    <tool_call> itself.
    """

    def __init__(self, added: Iterable[str], control: Iterable[str]) -> None:
        self._added = _any_of(added)
        self._control = _any_of(control)

    def escape(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> EscapedMessages:
        """Checked messages and tools, escaped; raises BadRequest."""
        escape = _unused_escape(messages, tools)
        escaped = [
            {
                key: value if key == "role" else _map_strings(value, self._escaping(message["role"], escape))
                for key, value in message.items()
            }
            for message in messages
        ]
        return EscapedMessages(escape, escaped, _map_strings(tools, self._escaping("tool", escape)))

    def _escaping(self, role: str, escape: str) -> Callable[[str], str]:
        """The function that escapes a text of this role."""
        spellings = self._control if role == "assistant" else self._added
        if spellings is None:
            return lambda text: text
        return lambda text: spellings.sub(lambda match: match[0][0] + escape + match[0][1:], text)


def _any_of(spellings: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted({text for text in spellings if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _unused_escape(*values: Any) -> str:
    """The first escape that occurs in none of the values; raises BadRequest."""
    try:
        text = json.dumps(values, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"The messages and tools must be JSON values ({error}).") from None
    for escape in ESCAPES:
        if escape not in text:
            return escape
    raise BadRequest("The messages use all of Unicode's 32 noncharacters U+FDD0 to U+FDEF; leave one out.")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string and key changed."""
    match value:
        case str():
            return change(value)
        case Mapping():
            return {change(str(key)): _map_strings(entry, change) for key, entry in value.items()}
        case list() | tuple():
            return [_map_strings(entry, change) for entry in value]
    return value
