"""ToolChoice: whether an answer must be a call, and of which function; and the rules that make it so.

Knows the tools' schemas, MiMo's notation and the notation of rules (Lark, as llguidance reads it); nothing of models
or sampling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from localmimo.chat.tool_call import CLOSE, OPEN, functions_of, takes_text
from localmimo.errors import BadRequest

Tools = Sequence[Mapping[str, Any]]
Mode = Literal["auto", "none", "required"]
Spell = Callable[[str], str]  # a tag as the rules write it

# Values that are text end with their closing tag; line breaks between tags are as the model likes.
COMMON = r"""
LINE: /\n?/
LINES: /\n{0,2}/
END: "</parameter>"
TEXT: (/(?s:.*)/ & ~/(?s:.*)<\/(parameter|tool_call)>(?s:.*)/) END
"""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What OpenAI calls tool_choice. `name`: the one function that is to be called, mode being "required"."""

    mode: Mode = "auto"
    name: str | None = None

    @classmethod
    def of(cls, asked: str | Mapping[str, Any], tools: Tools | None) -> ToolChoice:
        """ "auto", "none", "required" or {"type": "function", "function": {"name": ...}}; raises BadRequest."""
        match asked:
            case "auto" | "none":
                return cls(asked)
            case "required":
                choice = cls("required")
            case {"type": "function", "function": {"name": str(name)}}:
                choice = cls("required", name)
            case _:
                raise BadRequest(
                    f"tool_choice is {str(asked)[:80]}; it must be auto, none, required or "
                    '{"type": "function", "function": {"name": ...}}.'
                )
        names = [*functions_of(tools)]
        if not names or choice.name not in (None, *names):
            wanted = f"a call of {choice.name}" if choice.name else "a call"
            raise BadRequest(f"tool_choice asks for {wanted}; the tools are {', '.join(names) or 'none'}.")
        return choice


def rules_of_calls(tools: Tools, choice: ToolChoice, spell: Spell, answer: str | None = None) -> str:
    """Rules of an answer that is one call after the other, and nothing else.

    answer: a JSON schema; the answer may then be a value of it as well.
    """
    schemas = functions_of(tools)
    functions = [tool.get("function", tool) for tool in tools]
    wanted = [function for function in functions if choice.name in (None, function["name"])]
    rules = [line for n, function in enumerate(wanted) for line in _function(f"f{n}", function, schemas)]
    either = "LINES calls" if answer is None else f"(LINES calls) | (%json {answer})"
    names = " | ".join(f"f{n}" for n in range(len(wanted)))
    heads = [
        f"start: {either}",
        "calls: call (LINE call)*",
        f"call: {spell(OPEN)} LINE ({names}) LINE {spell(CLOSE)}",
    ]
    return "\n".join([*heads, *rules]) + COMMON


def _function(
    rule: str, function: Mapping[str, Any], schemas: Mapping[str, Mapping[str, Any]]
) -> Iterable[str]:
    """The rules of one function: its parameters in their order, those that are not required may be missing."""
    name = str(function["name"])
    schema = function.get("parameters") or {}
    required = schema.get("required")
    needed = required if isinstance(required, list) else []
    parts, values = [], []
    for n, (key, value) in enumerate(schemas[name].items()):
        part = f"{json.dumps(f'<parameter={key}>')} {rule}_{n} LINE"
        parts.append(part if key in needed else f"({part})?")
        values.append(f"{rule}_{n}: {_value(value, schema)}")
    head, end = json.dumps(f"<function={name}>"), json.dumps("</function>")
    return [f"{rule}: {' '.join([head, 'LINE', *parts, end])}", *values]


def _value(schema: Any, root: Mapping[str, Any]) -> str:
    """A parameter's value with its closing tag."""
    if not takes_text(schema):
        named = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return f"%json {json.dumps({**named, **schema, 'x-guidance': {'lenient': True}})} END"
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if not isinstance(choices, list) or not choices:
        return "TEXT"
    texts = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
    return f"({' | '.join(map(json.dumps, texts))}) END"
