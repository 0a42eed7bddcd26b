"""Check of a call's arguments against the function's JSON schema: types, choices, lists, objects.

Knows JSON values; nothing of functions or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from localmimo.chat.tool_call import typed


class Mismatch(ValueError):
    """A value that does not fit; the text says where and why, for the model to read."""


def fit_arguments(arguments: Mapping[str, Any], schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments as the function takes them (1 for 1.0, True for "true"); raises Mismatch."""
    properties = schema.get("properties") or {}
    missing = [key for key in schema.get("required") or () if key not in arguments]
    if missing:
        raise Mismatch(f"{name} needs {' and '.join(missing)}; it was given {_listed(arguments)}.")
    unknown = [key for key in arguments if key not in properties]
    if unknown and not schema.get("additionalProperties", False):
        raise Mismatch(f"{name} has no parameter {unknown[0]}; it has {_listed(properties)}.")
    return {key: fit_value(value, properties.get(key, {}), key) for key, value in arguments.items()}


def fit_value(value: Any, schema: Mapping[str, Any], where: str) -> Any:
    """One value as the function takes it. where: what the error calls it. Raises Mismatch."""
    kinds = _kinds(schema)
    if isinstance(value, str) and kinds and "string" not in kinds:
        value = typed(value, schema)
    if "anyOf" in schema:
        return _fit_any(value, schema["anyOf"], where)
    if kinds:
        value = _fit_kind(value, kinds, where)
    if "enum" in schema and value not in schema["enum"]:
        raise Mismatch(f"{where} is {value!r}; it must be one of {', '.join(map(repr, schema['enum']))}.")
    if isinstance(value, list) and "items" in schema:
        return [fit_value(item, schema["items"], f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), Mapping):
        return {
            key: fit_value(item, schema["additionalProperties"], f"{where}.{key}")
            for key, item in value.items()
        }
    return value


def _fit_any(value: Any, choices: list[Mapping[str, Any]], where: str) -> Any:
    for choice in choices:
        try:
            return fit_value(value, choice, where)
        except Mismatch:
            continue
    raise Mismatch(f"{where} is {value!r}, which fits none of the types that it may have.")


def _kinds(schema: Mapping[str, Any]) -> tuple[str, ...]:
    declared = schema.get("type")
    return (declared,) if isinstance(declared, str) else tuple(declared or ())


def _fit_kind(value: Any, kinds: tuple[str, ...], where: str) -> Any:
    for kind in kinds:
        if kind in _CHECKS and _CHECKS[kind](value):
            return value
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    raise Mismatch(f"{where} is {value!r}; it must be of type {' or '.join(kinds)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) if names else "nothing"
