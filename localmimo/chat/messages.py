"""Messages and tools as users and clients give them: checked, and converted to one form.

History is data: what a client sends back of earlier turns is taken where its meaning is clear, whatever its form.
An error is one sentence. Knows nothing of templates or models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from localmimo.chat.tool_call import read_arguments
from localmimo.errors import BadRequest

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SAME_ROLES = {"developer": "system", "function": "tool"}  # newer and older names

# What a content part that is no text is called where a line stands for it.
PART_NAMES = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "computer_screenshot": "image",
    "input_audio": "sound",
    "audio": "sound",
    "audio_url": "sound",
    "video": "video",
    "video_url": "video",
}


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages in the form that templates take; raises BadRequest."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise BadRequest("The messages must be a list of {role, content} objects.")
    if not messages:
        raise BadRequest("The conversation is empty: give at least one message.")
    checked: list[dict[str, Any]] = []
    open_calls: list[str] = []  # ids of the calls whose results may follow now
    ids: set[str] = set()  # of all calls
    newest = newest_turn(messages)
    for number, message in enumerate(messages, 1):
        clean = _check_message(number, message, is_new=number - 1 == newest)
        if clean["role"] == "tool":
            _match_result(number, clean, open_calls, ids)
        else:
            open_calls = [call["id"] for call in clean.get("tool_calls", ())]
            ids |= {name for name in open_calls if name}
        checked.append(clean)
    return checked


def newest_turn(messages: Sequence[Any]) -> int | None:
    """The index of the user's message that is to be answered; None where it has been, as in the middle of calls."""
    for number in range(len(messages) - 1, -1, -1):
        message = messages[number]
        role = message.get("role") if isinstance(message, Mapping) else None
        if role in ("user", "assistant"):
            return number if role == "user" else None
    return None


def _check_message(number: int, message: Message, *, is_new: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRequest(
            f"Message {number} is {_type_name(message)}; it must be an object with role and content."
        )
    role = message.get("role")
    role = SAME_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRequest(f"Message {number} has the role {role!r}; the roles are {', '.join(ROLES)}.")
    clean: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls")
    if not calls and role == "assistant" and message.get("function_call"):  # the older name
        calls = [message["function_call"]]
    if calls:
        if role != "assistant":
            raise BadRequest(
                f"Message {number} has tool_calls but the role {role}; only the assistant calls tools."
            )
        if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
            raise BadRequest(f"Message {number}: tool_calls is {_type_name(calls)}; it must be a list.")
        clean["tool_calls"] = [_check_call(number, call) for call in calls]
    clean["content"] = _check_content(number, message, role, is_new=is_new)
    reasoning = message.get("reasoning_content")
    reasoning = message.get("reasoning") if reasoning is None else reasoning
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise BadRequest(
                f"Message {number}: reasoning_content is {_type_name(reasoning)}; it must be text."
            )
        clean["reasoning_content"] = reasoning
    if role == "tool" and message.get("tool_call_id") is not None:
        clean["tool_call_id"] = str(message["tool_call_id"])
    return clean


def _check_content(number: int, message: Message, role: str, *, is_new: bool) -> str:
    content = message.get("content")
    if content is None and role == "assistant":
        refusal = message.get("refusal")
        return refusal if isinstance(refusal, str) else ""
    if role == "tool" and (content is None or isinstance(content, Mapping)):
        return result_text(content)
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return join_parts([_part_text(number, part, may_be_left_out=not is_new) for part in content])
    raise BadRequest(
        f"Message {number}: the content is {_type_name(content)}; it must be text or a list of text parts."
    )


def _part_text(number: int, part: object, *, may_be_left_out: bool) -> str:
    text = part_text(part)
    if text is not None:
        return text
    if may_be_left_out and isinstance(part, Mapping):
        return placeholder(part)
    kind = part.get("type") if isinstance(part, Mapping) else _type_name(part)
    raise BadRequest(
        f"Message {number} has a content part of type {kind!r}; this runtime reads text parts only."
    )


def part_text(part: object) -> str | None:
    """The text of a content part of any dialect; None where it holds none."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return None
    kind, source = part.get("type"), part.get("source")
    if kind == "document" and isinstance(source, Mapping):
        source_kind = source.get("type")
        text = source.get("data") if source_kind == "text" else source.get("content")
        return result_text(text) if source_kind in ("text", "content") else None
    if kind in ("search_result", "compaction") and part.get("content") is not None:
        return result_text(part["content"])
    for name in ("refusal", "text") if kind == "refusal" else ("text",):
        if isinstance(part.get(name), str):
            return str(part[name])
    return None


def placeholder(part: Mapping[str, Any]) -> str:
    """The line that stands for an image or a file of an old turn."""
    kind = part.get("type")
    noun = PART_NAMES.get(kind, "file") if isinstance(kind, str) else "file"
    file = part.get("file")
    names = [
        part.get("filename"),
        part.get("title"),
        file.get("filename") if isinstance(file, Mapping) else None,
    ]
    name = next((" " + name[:80] for name in names if isinstance(name, str) and name), "")
    return f"[{noun}{name} left out: this model reads text alone]"


def join_parts(texts: Sequence[str]) -> str:
    """Texts of parts joined as they are, but for the lines that stand for something else."""
    joined = ""
    for number, text in enumerate(texts):
        is_line = text.startswith("[") and text.endswith(" left out: this model reads text alone]")
        if is_line and joined and not joined.endswith("\n"):
            joined += "\n"
        joined += text + ("\n" if is_line and number + 1 < len(texts) else "")
    return joined


def result_text(value: object) -> str:
    """A tool's result as text: its text parts in lines, a line for each image or file, and other data as JSON."""
    if value is None:
        return ""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return "\n".join(result_text(entry) for entry in value)
    text = part_text(value)
    if text is not None:
        return text
    if isinstance(value, Mapping):
        kind = value.get("type")
        if kind in (*PART_NAMES, "file", "input_file", "document"):
            return placeholder(value)
        value = {key: entry for key, entry in value.items() if not str(key).startswith("encrypted")}
    return json.dumps(value, ensure_ascii=False)


def _check_call(number: int, call: object) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    custom = call.get("custom") if isinstance(call, Mapping) else None
    if isinstance(custom, Mapping):  # a call whose input is bare text
        function = {"name": custom.get("name"), "arguments": {"input": custom.get("input") or ""}}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRequest(f"Message {number} has a tool call without a function name.")
    assert isinstance(call, Mapping)
    arguments = read_arguments(function["name"], function.get("arguments"))
    named = {"name": function["name"], "arguments": arguments}
    return {"id": str(call.get("id") or ""), "type": "function", "function": named}


def _match_result(number: int, message: dict[str, Any], open_calls: list[str], ids: set[str]) -> None:
    """Remove the call that a tool's result answers. A second result of a call is taken too."""
    wanted = message.get("tool_call_id")
    if wanted in ids and wanted not in open_calls:
        return
    if not open_calls:
        raise BadRequest(
            f"Message {number} is a tool result, but no tool call is waiting for one; "
            "it must follow the assistant message that made the call."
        )
    if not wanted:
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
