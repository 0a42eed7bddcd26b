"""Tool call: one function call in MiMo's notation, and the parser of its text by the tools' schemas.

Knows nothing of streams, templates or who runs the function.

    <tool_call>
    <function=NAME>
    <parameter=KEY>VALUE</parameter>
    </function>
    </tool_call>

White space between the tags is optional (V2.6 writes none). A value is everything between its tags, unchanged.
"""

from __future__ import annotations

import ast
import json
import logging
import math
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("localmimo.chat")

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
FUNCTION = "<function="
FUNCTION_END = "</function>"
PARAMETER = "<parameter="
PARAMETER_END = "</parameter>"

HEAD = re.compile(r"<tool_call>\s*<function=([^>]+)>")
# A value ends at the first closing tag that another parameter or the function's end follows, so that a value
# may itself contain </parameter>.
VALUE = re.compile(r"\s*<parameter=([^>]+)>(.*?)</parameter>(?=\s*(?:<parameter=|\Z))", re.DOTALL)

CHOICES = ("anyOf", "oneOf", "allOf")

Schema = Mapping[str, Any]
Functions = Mapping[str, Schema]  # function name -> its parameters' schemas by name


def new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; `text` is what it wrote, unchanged."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=new_id, compare=False)
    text: str = field(default="", compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The call in the shape of a chat message's `tool_calls`, its arguments as JSON text."""
        function = {"name": self.name, "arguments": self.arguments_json}
        return {"id": self.id, "type": "function", "function": function}

    @property
    def arguments_json(self) -> str:
        return as_json(self.arguments)


def as_json(value: object) -> str:
    """A value in the JSON notation of a call's arguments."""
    return json.dumps(value, ensure_ascii=False)


UNREAD = "arguments"  # the parameter under which arguments that are no JSON object are shown to the model


def read_arguments(name: str, value: object) -> dict[str, Any]:
    """The arguments of a call in a conversation's history, as a client sent them: an object, or JSON text.

    History is data: what is no JSON object (a call that was cut off, say) is kept as text under one parameter, as a
    template writes parameters only.
    """
    if isinstance(value, str) and value.strip():
        try:
            found = json.loads(value, strict=False)  # takes line breaks inside of texts
        except (ValueError, RecursionError):
            found = value
    else:
        found = value or {}
    if isinstance(found, Mapping):
        return dict(found)
    text = value if isinstance(value, str) else as_json(value)
    log.warning(
        "The arguments of %.80r in the history are no JSON object (%d characters); they are taken as text.",
        name,
        len(text),
    )
    return {UNREAD: text}


def functions_of(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Schema]:
    """Name -> parameter schemas of every tool, written as {"function": {...}} or as the function itself."""
    found: dict[str, Schema] = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        schema = function.get("parameters") or {}
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        found[str(function["name"])] = {key: _resolved(value, schema) for key, value in properties.items()}
    return found


def _resolved(schema: Any, root: Schema, depth: int = 4) -> Any:
    """The schema of a parameter with its references resolved, as far as its type depends on them."""
    if not isinstance(schema, Mapping) or not depth:
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found: Any = root
        for key in reference[2:].split("/"):
            found = found.get(key) if isinstance(found, Mapping) else None
        return _resolved(found, root, depth - 1)
    choices = {
        key: [_resolved(choice, root, depth - 1) for choice in value]
        for key, value in schema.items()
        if key in CHOICES and isinstance(value, list)
    }
    return {**schema, **choices} if choices else schema


def parse_call(block: str, functions: Functions) -> ToolCall | None:
    """The call in a text `<tool_call>...`, or None where it is no call or names no known function.

    The last closing tags may be missing, but every parameter must be closed.
    """
    head = HEAD.match(block)
    if head is None or (name := head[1].strip()) not in functions:
        return None
    body = block[head.end() :].rstrip().removesuffix(CLOSE).rstrip().removesuffix(FUNCTION_END)
    texts = _parameters(body)
    if texts is None:
        return None
    schemas = functions[name]
    arguments = {key: typed(text, schemas.get(key)) for key, text in texts.items()}
    return ToolCall(name, arguments, text=block)


def _parameters(body: str) -> dict[str, str] | None:
    """Each parameter's text by name, or None where there is anything else."""
    found: dict[str, str] = {}
    position = 0
    while match := VALUE.match(body, position):
        key = match[1].strip()
        if key in found:
            return None  # given twice: which one is meant is unknown
        found[key] = match[2]
        position = match.end()
    return None if body[position:].strip() else found


NULLS = ("null", "None")


def takes_text(schema: object) -> bool:
    """Whether a value of this schema may be any text."""
    kinds = _kinds(schema)
    return not kinds or "string" in kinds


def is_text(schema: object, prefix: str) -> bool:
    """Whether a value that begins with `prefix` is text, whatever follows."""
    may_be_null = "null" in _kinds(schema) and any(null.startswith(prefix.strip()) for null in NULLS)
    return takes_text(schema) and not may_be_null


def typed(text: str, schema: object) -> Any:
    """A parameter's text as a value of its schema's type; the text itself where it does not fit."""
    kinds = _kinds(schema)
    if "null" in kinds and text.strip() in NULLS:
        return None
    if takes_text(schema):
        return text
    for kind in ("boolean", "integer", "number", "object", "array"):
        if kind in kinds and (value := _READERS[kind](text.strip())) is not None:
            return value
    return text


def _kinds(schema: object) -> frozenset[str]:
    """The JSON types that a schema allows; empty where it names none."""
    if not isinstance(schema, Mapping):
        return frozenset()
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared] if isinstance(declared, str) else []
    kinds = {_ALIASES.get(str(name).lower(), "string") for name in names}
    for key in CHOICES:
        choices = schema.get(key)
        for choice in choices if isinstance(choices, list) else ():
            kinds |= _kinds(choice)
    return frozenset(kinds)


_ALIASES = {
    "null": "null",
    "none": "null",
    "bool": "boolean",
    "boolean": "boolean",
    "int": "integer",
    "integer": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "number": "number",
    "object": "object",
    "dict": "object",
    "array": "array",
    "list": "array",
}


def _boolean(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.lower())


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _number(text: str) -> int | float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None  # JSON has no infinity
    whole = _integer(text)
    return value if whole is None else whole


def _literal(text: str, kind: type) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
            json.dumps(value, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, kind):
            return value
    return None


_READERS: dict[str, Callable[[str], Any]] = {
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "object": lambda text: _literal(text, dict),
    "array": lambda text: _literal(text, list),
}
