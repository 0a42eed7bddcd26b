"""Tool: a Python function that a model may call. Makes its schema, checks and runs calls, gives results as text.

Knows functions and JSON; nothing of models, of who allows a call or of what happens with its result.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import threading
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from localmimo.errors import BadRequest
from localmimo.tools.arguments import Mismatch, fit_arguments

LIMIT_S = 60.0
MAX_CHARS = 20_000  # of a result; a longer one loses its middle
DECLINED = "error: the user declined this call."
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")

Runner = Callable[[dict[str, Any], float], Any]  # (arguments, limit in seconds) -> result


class ToolFailed(Exception):
    """A call without a result; the text says why, for the model to read."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One function: what the model reads of it, and how to run it."""

    name: str
    description: str
    parameters: dict[str, Any]  # JSON schema of an object
    runner: Runner

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """A tool from a function's annotations and docstring; raises BadRequest where they say too little."""
        name = getattr(function, "__name__", "")
        if not NAME.fullmatch(name):
            raise BadRequest(f"The tool {function!r} has no name to call it by; give a named function.")
        summary, descriptions = _docstring(inspect.getdoc(function) or "")
        properties, required = {}, []
        for parameter in _signature(function, name).values():
            schema = _parameter_schema(name, parameter)
            if parameter.name in descriptions:
                schema = {"description": descriptions[parameter.name]} | schema
            properties[parameter.name] = schema
            if parameter.default is parameter.empty:
                required.append(parameter.name)
        schema = {"type": "object", "properties": properties, "required": required}
        return cls(
            name, summary, schema, lambda arguments, limit_s: _run_in_thread(function, arguments, limit_s)
        )

    def schema(self) -> dict[str, Any]:
        """The tool as chat templates and clients write it."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.parameters}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": function}

    def call(
        self, arguments: Mapping[str, Any], *, limit_s: float = LIMIT_S, max_chars: int = MAX_CHARS
    ) -> str:
        """Run the function: its result as text, or a sentence that begins with "error:". Raises none of its errors."""
        try:
            result = self.runner(fit_arguments(dict(arguments), self.parameters, self.name), limit_s)
            return cut(as_text(result), max_chars)
        except (Mismatch, ToolFailed) as error:
            return cut(f"error: {error}", max_chars)


def tools_of(given: Iterable[Any] | None) -> tuple[list[dict[str, Any]] | None, dict[str, Tool]]:
    """(schemas for the model, tools that can be run by name) of functions, Tools and schemas. Raises BadRequest."""
    if isinstance(given, (str, bytes, Mapping)) or (given is not None and not isinstance(given, Iterable)):
        raise BadRequest("The tools must be a list of function objects.")
    schemas: list[Any] = []
    tools: dict[str, Tool] = {}
    for entry in given or ():
        tool = Tool.of(entry) if callable(entry) and not isinstance(entry, Tool) else entry
        if isinstance(tool, Tool):
            if tool.name in tools:
                raise BadRequest(f"Two tools are called {tool.name}; names must differ.")
            tools[tool.name] = tool
        schemas.append(tool.schema() if isinstance(tool, Tool) else tool)
    return schemas or None, tools


# ---- running ----


def _run_in_thread(function: Callable[..., Any], arguments: dict[str, Any], limit_s: float) -> Any:
    """Call a function in a thread. One that takes too long is left running: a thread cannot be ended."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            result = function(**arguments)
            outcome.append((asyncio.run(result) if inspect.iscoroutine(result) else result, None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name=f"tool-{function.__name__}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not outcome:
        raise ToolFailed(f"{function.__name__} took longer than {limit_s:g} s and was left.")
    result, error = outcome[0]
    if error is not None:
        raise ToolFailed(f"{type(error).__name__}: {error}")
    return result


def as_text(result: Any) -> str:
    """A result as the model reads it: text unchanged, anything else as JSON."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolFailed(f"its result is no JSON ({error})") from None


def cut(text: str, max_chars: int) -> str:
    """The text. One that is too long loses its middle."""
    if len(text) <= max_chars:
        return text
    head, tail = max_chars - max_chars // 4, max_chars // 4
    left_out = len(text) - head - tail
    return f"{text[:head]}\n[... {left_out:,} of {len(text):,} characters left out ...]\n{text[len(text) - tail :]}"


# ---- schemas ----


def _signature(function: Callable[..., Any], name: str) -> Mapping[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except (ValueError, TypeError, NameError, SyntaxError, AttributeError) as error:
        raise BadRequest(f"The annotations of {name} cannot be read ({error}).") from None
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise BadRequest(
                f"{name} cannot be a tool: its parameter {parameter} has no single name to be given by."
            )
    return parameters


def _parameter_schema(name: str, parameter: inspect.Parameter) -> dict[str, Any]:
    if parameter.annotation is parameter.empty:
        raise BadRequest(
            f"{name} cannot be a tool: its parameter {parameter.name} has no annotation; write {parameter.name}: str."
        )
    try:
        schema = schema_of(parameter.annotation)
    except TypeError:
        raise BadRequest(
            f"{name} cannot be a tool: its parameter {parameter.name} is of type {parameter.annotation}; types are "
            "str, int, float, bool, None, list, dict, Literal, unions of these, and Annotated with a text."
        ) from None
    has_default = parameter.default is not parameter.empty and parameter.default is not None
    if has_default and isinstance(parameter.default, (str, int, float, bool)):
        schema = schema | {"default": parameter.default}
    return schema


_SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    None: {"type": "null"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}


def schema_of(annotation: Any) -> dict[str, Any]:
    """The JSON schema of a type annotation. Raises TypeError for a type that JSON does not have."""
    try:
        if annotation in _SIMPLE:
            return dict(_SIMPLE[annotation])
    except TypeError:  # not hashable
        pass
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        notes = [note for note in parts[1:] if isinstance(note, str)]
        return schema_of(parts[0]) | ({"description": notes[0]} if notes else {})
    if origin is Literal:
        return _choice(parts)
    if origin in (Union, types.UnionType):
        return _union([schema_of(part) for part in parts])
    if origin is list or origin in (Sequence, Iterable):
        return {"type": "array", "items": schema_of(parts[0])}
    if origin in (dict, Mapping) and parts[0] is str:
        return {"type": "object", "additionalProperties": schema_of(parts[1])}
    raise TypeError(annotation)


def _choice(values: Sequence[Any]) -> dict[str, Any]:
    schema = _union([schema_of(type(value)) for value in values])
    return schema | {"enum": list(values)}


def _union(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    different = [schema for number, schema in enumerate(schemas) if schema not in schemas[:number]]
    if len(different) == 1:
        return different[0]
    if all(set(schema) == {"type"} for schema in different):
        return {"type": [schema["type"] for schema in different]}
    return {"anyOf": different}


_SECTION = re.compile(r"^(Args|Arguments|Parameters):?\s*$", re.MULTILINE)
_NEXT_SECTION = re.compile(r"^(?:Returns|Raises|Yields|Examples?|Notes?):?\s*$", re.MULTILINE)
_ENTRY = re.compile(r"(\w+)(?: ?\([^)]*\))?: (.*)")
_FIELD = re.compile(r"^:param (?:\w+ )?(\w+): (.*(?:\n +.*)*)", re.MULTILINE)


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """(summary, description of each parameter), from an "Args:" section or ":param name:" lines."""
    section = _SECTION.search(text)
    descriptions = dict(_FIELD.findall(text)) | (_entries(text[section.end() :]) if section else {})
    summary = _NEXT_SECTION.split(text[: section.start()] if section else text)[0]
    summary = re.split(r"^:\w+", summary, maxsplit=1, flags=re.MULTILINE)[0]
    return " ".join(summary.split()), {name: " ".join(text.split()) for name, text in descriptions.items()}


def _entries(text: str) -> dict[str, str]:
    """The parameters of a section, one a line. Deeper lines continue it; a line that is not indented ends it."""
    found: dict[str, str] = {}
    name, depth = "", None
    for line in filter(str.strip, text.splitlines()):
        indent = len(line) - len(line.lstrip())
        depth = indent if depth is None else depth
        if not indent or indent < depth:
            break
        if indent == depth and (entry := _ENTRY.match(line.strip())):
            name = entry[1]
            found[name] = entry[2]
        elif name:
            found[name] += "\n" + line
    return found
