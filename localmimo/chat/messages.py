"""Messages and tools as users and clients give them: checked, and converted to one form.

An error is one sentence. Knows nothing of templates or models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from localmimo.errors import BadRequest

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages in the form that templates take; raises BadRequest."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise BadRequest("The messages must be a list of {role, content} objects.")
    if not messages:
        raise BadRequest("The conversation is empty: give at least one message.")
    checked: list[dict[str, Any]] = []
    open_calls: list[str] = []  # ids of the calls whose results may follow now
    for number, message in enumerate(messages, 1):
        clean = _check_message(number, message)
        if clean["role"] == "tool":
            _match_result(number, clean, open_calls)
        else:
            open_calls = [call["id"] for call in clean.get("tool_calls", ())]
        checked.append(clean)
    return checked


def _check_message(number: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRequest(
            f"Message {number} is {_type_name(message)}; it must be an object with role and content."
        )
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise BadRequest(f"Message {number} has the role {role!r}; the roles are {', '.join(ROLES)}.")
    clean: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant":
            raise BadRequest(
                f"Message {number} has tool_calls but the role {role}; only the assistant calls tools."
            )
        clean["tool_calls"] = [_check_call(number, call) for call in calls]
    clean["content"] = _check_content(number, message.get("content"), may_be_empty=role == "assistant")
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise BadRequest(
                f"Message {number}: reasoning_content is {_type_name(reasoning)}; it must be text."
            )
        clean["reasoning_content"] = reasoning
    if role == "tool" and message.get("tool_call_id") is not None:
        clean["tool_call_id"] = str(message["tool_call_id"])
    return clean


def _check_content(number: int, content: object, *, may_be_empty: bool) -> str:
    if content is None and may_be_empty:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return "".join(_text_part(number, part) for part in content)
    raise BadRequest(
        f"Message {number}: the content is {_type_name(content)}; it must be text or a list of text parts."
    )


def _text_part(number: int, part: object) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, Mapping) else _type_name(part)
    raise BadRequest(
        f"Message {number} has a content part of type {kind!r}; this runtime reads text parts only."
    )


def _check_call(number: int, call: object) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRequest(f"Message {number} has a tool call without a function name.")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            name = function["name"]
            raise BadRequest(
                f"Message {number}: the arguments of {name} are not valid JSON ({error})."
            ) from None
    if not isinstance(arguments, Mapping):
        raise BadRequest(f"Message {number}: the arguments of {function['name']} must be a JSON object.")
    assert isinstance(call, Mapping)
    named = {"name": function["name"], "arguments": dict(arguments)}
    return {"id": str(call.get("id") or ""), "type": "function", "function": named}


def _match_result(number: int, message: dict[str, Any], open_calls: list[str]) -> None:
    """Remove the call that a tool's result answers."""
    if not open_calls:
        raise BadRequest(
            f"Message {number} is a tool result, but no tool call is waiting for one; "
            "it must follow the assistant message that made the call."
        )
    wanted = message.get("tool_call_id")
    if wanted is None:
        open_calls.pop(0)
    elif wanted in open_calls:
        open_calls.remove(wanted)
    elif "" in open_calls:
        open_calls.remove("")  # the call was given without an id
    else:
        raise BadRequest(
            f"Message {number} answers the tool call {wanted!r}, but the calls waiting for a result "
            f"are {', '.join(map(repr, open_calls))}."
        )


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools as {"type": "function", "function": {...}} objects, or None; raises BadRequest."""
    if not tools:
        return None
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise BadRequest("The tools must be a list of function objects.")
    checked = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequest(f"Tool {number} has no function name.")
        if not isinstance(function.get("parameters", {}) or {}, Mapping):
            raise BadRequest(f"Tool {number} ({function['name']}): parameters must be a JSON schema object.")
        checked.append({"type": "function", "function": dict(function)})
    return checked


def _type_name(value: object) -> str:
    """A value's type in words, with its article."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
