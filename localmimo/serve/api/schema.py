"""JSON schemas of request bodies: builders, and the fields that come from the declared options.

Knows JSON Schema and the declaration; no dialect's own fields.
"""

from __future__ import annotations

from typing import Any

from localmimo.decode.options import OPTIONS
from localmimo.option import Dialect, Option
from localmimo.serve.api.parameters import EFFORTS

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": ["boolean", "null"]}
ANYTHING: Schema = {}
OBJECT: Schema = {"type": "object"}


def count(least: int, most: int | None = None) -> Schema:
    return {"type": ["integer", "null"], "minimum": least} | ({} if most is None else {"maximum": most})


def number(least: float, most: float) -> Schema:
    return {"type": ["number", "null"], "minimum": least, "maximum": most}


def list_of(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def object_of(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def either(*choices: Schema) -> Schema:
    return {"anyOf": list(choices)}


def typed(kind: str, required: str, **properties: Schema) -> Schema:
    """An object that says its type."""
    return object_of({"type": {"const": kind}, **properties}, "type", required)


OTHER_TOOL = object_of(
    {"type": {"type": "string", "not": {"enum": ["function", "custom"]}}}, "type"
)  # left out of the prompt, and named in a header of the response
TOOL_CHOICE: Schema = {"enum": ["auto", "none", "required", None]}
STOP = either(
    {"type": "null"}, {"type": "string", "minLength": 1}, list_of({"type": "string", "minLength": 1})
)
TEXT_PARTS = list_of(typed("text", "text", text=TEXT), minItems=1)
EFFORT: Schema = {"enum": [*EFFORTS, None]}
THINKING: dict[str, Schema] = {
    "reasoning_effort": EFFORT,
    "reasoning": object_of({"effort": EFFORT}),
    "thinking": object_of({"type": {"enum": ["enabled", "disabled", "adaptive"]}, "budget_tokens": count(0)}),
    "chat_template_kwargs": object_of({"enable_thinking": FLAG}),
}
COMMON: dict[str, Schema] = {"model": {"type": ["string", "null"]}, "stream": FLAG}


def option_fields(dialect: Dialect) -> dict[str, Schema]:
    """The fields of a dialect that are numbers, texts or token biases, as the options are declared."""
    return {
        name: _schema_of(option)
        for option in OPTIONS.values()
        if option.kind in ("number", "count", "texts", "mapping") and option.name != "think_budget"
        for name in option.http.get(dialect, ())
        if option.name != "tools"
    }


def _schema_of(option: Option) -> Schema:
    least, most = option.http_range
    match option.kind:
        case "number":
            return number(least, most)
        case "count":
            return count(int(least), int(most))
        case "mapping":
            return {
                "type": ["object", "null"],
                "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                "additionalProperties": {"type": "number", "minimum": least, "maximum": most},
            }
    return STOP
