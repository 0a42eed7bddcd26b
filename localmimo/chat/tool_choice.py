"""Tool choice: whether an answer must be a call and of which function, and the grammar that forces it.

Knows the tools' schemas, MiMo's notation and the notation of grammars (Lark, as llguidance reads it); nothing of models
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
Spell = Callable[[str], str]  # a tag -> the tag in the grammar's notation

# A value that is text ends with its closing tag. Line breaks between tags are optional.
COMMON = r"""
LINE: /\n?/
LINES: /\n{0,2}/
END: "</parameter>"
TEXT: (/(?s:.*)/ & ~/(?s:.*)<\/(parameter|tool_call)>(?s:.*)/) END
"""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """OpenAI's tool_choice. name: the only function that may be called; the mode is then "required"."""

    mode: Mode = "auto"
    name: str | None = None

    @classmethod
    def of(cls, value: str | Mapping[str, Any], tools: Tools | None) -> ToolChoice:
        """ "auto", "none", "required" or {"type": "function", "function": {"name": ...}}; raises BadRequest."""
        match value:
            case "auto" | "none":
                return cls(value)
            case "required":
                choice = cls("required")
            case {"type": "function", "function": {"name": str(name)}}:
                choice = cls("required", name)
            case _:
                raise BadRequest(
                    f"tool_choice is {str(value)[:80]}; it must be auto, none, required or "
                    '{"type": "function", "function": {"name": ...}}.'
                )
        names = [*functions_of(tools)]
        if not names or choice.name not in (None, *names):
            wanted = f"a call of {choice.name}" if choice.name else "a call"
            raise BadRequest(f"tool_choice asks for {wanted}; the tools are {', '.join(names) or 'none'}.")
        return choice


def rules_of_calls(tools: Tools, choice: ToolChoice, spell: Spell, answer: str | None = None) -> str:
    """The grammar of an answer that is a sequence of calls and nothing else.

    answer: a JSON schema; the answer may then also be a value of this schema.
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
    """The rules of one function: its parameters in their order; those that are not required may be missing."""
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
    """The rule of a parameter's value, with its closing tag."""
    if not takes_text(schema):
        named = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return f"%json {json.dumps({**named, **schema, 'x-guidance': {'lenient': True}})} END"
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if not isinstance(choices, list) or not choices:
        return "TEXT"
    texts = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
    return f"({' | '.join(map(json.dumps, texts))}) END"
