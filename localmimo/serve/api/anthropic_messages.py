"""Messages: POST /v1/messages, Anthropic's dialect.

Knows the dialect's fields and events; nothing of HTTP, of threads or of the other dialects.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from localmimo.chat.messages import join_parts, newest_turn, part_text, placeholder, result_text
from localmimo.chat.stream_parser import Kind
from localmimo.decode.steps import Step
from localmimo.serve.api.content_blocks import ContentPart, ContentParts, PartChange
from localmimo.serve.api.json_fields import Fields
from localmimo.serve.api.parameters import (
    Request,
    forced,
    left_out,
    read_options,
    read_thinking,
    refuse_unknown,
)
from localmimo.serve.api.schema import (
    COMMON,
    FLAG,
    OBJECT,
    OTHER_TOOL,
    TEXT,
    TEXT_PARTS,
    THINKING,
    either,
    list_of,
    object_of,
    option_fields,
    typed,
)
from localmimo.serve.context import ServerContext
from localmimo.serve.errors import ApiError
from localmimo.serve.errors import Kind as ErrorKind
from localmimo.serve.response import Event
from localmimo.serve.worker import Job

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "context": "max_tokens"}
ERROR_TYPES: dict[ErrorKind, str] = {
    "key": "authentication_error",
    "forbidden": "permission_error",
    "missing": "not_found_error",
    "large": "request_too_large",
    "full": "rate_limit_error",
    "loading": "overloaded_error",
    "broken": "api_error",
}

# The body, as /openapi.json describes it.
BLOCK = either(
    typed("text", "text", text=TEXT),
    typed("thinking", "thinking", thinking=TEXT, signature=TEXT),
    typed("tool_use", "name", id=TEXT, name=TEXT, input=OBJECT),
    typed("tool_result", "tool_use_id", tool_use_id=TEXT, content=either(TEXT, TEXT_PARTS), is_error=FLAG),
)
MESSAGES = object_of(
    COMMON
    | option_fields("messages")
    | THINKING
    | {
        "max_tokens": {"type": "integer", "minimum": 1},
        "messages": list_of(
            object_of(
                {
                    "role": {"enum": ["user", "assistant"]},
                    "content": either(TEXT, list_of(BLOCK, minItems=1)),
                },
                "role",
                "content",
            ),
            minItems=1,
        ),
        "system": either(TEXT, TEXT_PARTS),
        "tools": list_of(
            either(object_of({"name": TEXT, "description": TEXT, "input_schema": OBJECT}, "name"), OTHER_TOOL)
        ),
        "tool_choice": either(
            object_of({"type": {"enum": ["auto", "none", "any"]}, "disable_parallel_tool_use": FLAG}),
            typed("tool", "name", name=TEXT, disable_parallel_tool_use=FLAG),
        ),
    },
    "messages",
    "max_tokens",
)
COUNTED = MESSAGES | {"required": ["messages"]}


class Messages:
    """One request, and the answer's events or object."""

    path = "/v1/messages"
    summary = "Answer a conversation (Anthropic's messages)."
    body = MESSAGES
    error_schema = "AnthropicError"

    def __init__(self, fields: Fields, context: ServerContext) -> None:
        fields.needed("max_tokens")
        self.request = read_messages(fields)
        self._model = context.model
        self._id = f"msg_{uuid.uuid4().hex}"
        self._blocks = ContentParts(self.request.stream)

    # ---- stream ----

    def first_events(self, job: Job) -> Iterable[Event]:
        usage = {"input_tokens": len(job.prompt.tokens), "output_tokens": 0}
        yield _event("message_start", message=self._message([], None, None, usage))

    def push(self, step: Step) -> Iterable[Event]:
        for change in self._blocks.push(step):
            yield from _block_events(change)

    def last_events(self, job: Job) -> Iterable[Event]:
        reason, stop_text = _ending(job)
        delta = {"stop_reason": reason, "stop_sequence": stop_text}
        yield _event("message_delta", delta=delta, usage=_usage(job), timings=job.stats.as_dict())
        yield _event("message_stop")

    def broken(self, api_error: ApiError) -> Iterable[Event]:
        yield Event(self.error_body(api_error), "error")

    def pause(self, note: str) -> Event | None:
        return _event("ping")

    # ---- whole ----

    def whole(self, job: Job) -> dict[str, Any]:
        content = [_content(block) for block in self._blocks.done]
        whole = self._message(content, *_ending(job), _usage(job))
        return whole | {"timings": job.stats.as_dict()}

    def _message(
        self, content: list[Any], reason: str | None, stop_text: str | None, usage: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop_text,
            "usage": usage,
        }

    @staticmethod
    def error_body(api_error: ApiError) -> dict[str, Any]:
        kind = ERROR_TYPES.get(api_error.kind, "invalid_request_error")
        message = api_error.sentence
        if api_error.overflow is not None:  # in Anthropic's words: agents then shorten the conversation
            message = "prompt is too long: {} tokens > {} maximum".format(*api_error.overflow)
        return {"type": "error", "error": {"type": kind, "message": message}}


class CountTokens:
    """POST /v1/messages/count_tokens: how long the prompt would be."""

    path = "/v1/messages/count_tokens"
    summary = "Tokens of a conversation."
    body = COUNTED
    error_schema = "AnthropicError"

    def __init__(self, fields: Fields, context: ServerContext) -> None:
        self.request = read_messages(fields)

    def counted(self, tokens: list[int]) -> dict[str, Any]:
        return {"input_tokens": len(tokens)}

    error_body = staticmethod(Messages.error_body)


# ---- in ----


def read_messages(fields: Fields) -> Request:
    """The request that a body holds."""
    fields.needed("messages")
    refuse_unknown(fields, "stop")
    tools, warnings = _read_tools(fields)
    think, budget = read_thinking(fields)
    choice, parallel = _read_choice(fields)
    system = _text(fields, "system")
    messages = [{"role": "system", "content": system}] if system else []
    given = fields.objects("messages")
    newest = newest_turn([message.values for message in given])
    for number, message in enumerate(given):
        messages += _read_message(message, is_new=number == newest)
    options = read_options(
        fields,
        "messages",
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        think=think,
        think_budget=budget,
    )
    return Request(messages, options=options, stream=bool(fields.flag("stream")), warnings=warnings)


def _read_message(message: Fields, *, is_new: bool) -> list[dict[str, Any]]:
    role = message.choice("role", "user", "assistant", "system")
    message.needed("role")
    if role != "assistant":
        return _read_said(message, str(role), is_new=is_new)
    said: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for block in _blocks_of(message):
        kind = block.text("type") or ""
        if kind.endswith("tool_result"):  # of a tool that another server ran
            said.append(_read_result(block))
        else:
            _add_block(_assistant(said), kind, block)
    return said


def _assistant(said: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message at the end; a new one behind a result."""
    if said[-1]["role"] != "assistant":
        said.append({"role": "assistant", "content": ""})
    return said[-1]


def _add_block(said: dict[str, Any], kind: str, block: Fields) -> None:
    match kind:
        case "thinking":
            said["reasoning_content"] = said.get("reasoning_content", "") + (block.text("thinking") or "")
        case "redacted_thinking":
            pass  # never written by this server
        case "tool_use" | "server_tool_use" | "mcp_tool_use":
            said.setdefault("tool_calls", []).append(_read_call(block))
        case "text":
            said["content"] += block.text("text") or ""
        case _:
            text = part_text(block.values)
            said["content"] = join_parts(
                [said["content"], placeholder(block.values) if text is None else text]
            )


def _read_said(message: Fields, role: str, *, is_new: bool) -> list[dict[str, Any]]:
    """A user's turn: results of tools first, each a message of its own, then the text."""
    results, texts = [], []
    for block in _blocks_of(message):
        kind = block.text("type") or ""
        if kind == "text":
            texts.append(block.text("text") or "")
        elif kind.endswith("tool_result"):
            results.append(_read_result(block))
        elif (text := part_text(block.values)) is not None:
            texts.append(text)
        elif is_new:
            block.wrong("type", "text or tool_result: this server reads text alone")
        else:
            texts.append(placeholder(block.values))
    said = [{"role": role, "content": "\n".join(texts)}] if texts or not results else []
    return results + said


def _blocks_of(message: Fields) -> list[Fields]:
    content = message.values.get("content")
    if isinstance(content, str):
        return [Fields({"type": "text", "text": content})]
    message.needed("content")
    return message.objects("content")


def _read_call(block: Fields) -> dict[str, Any]:
    block.needed("name")
    function = {"name": block.text("name"), "arguments": block.values.get("input")}
    return {"id": block.text("id") or "", "type": "function", "function": function}


def _read_result(block: Fields) -> dict[str, Any]:
    content = result_text(block.values.get("content"))
    if block.flag("is_error"):
        content = f"Error: {content}"
    return {"role": "tool", "tool_call_id": block.text("tool_use_id"), "content": content}


def _text(fields: Fields, name: str) -> str:
    """Text, or a list of text blocks joined; empty where there is none."""
    value = fields.values.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for block in fields.objects(name):
        block.choice("type", "text")
        block.needed("text")
        texts.append(block.text("text") or "")
    return "\n".join(texts)


def _read_tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, tuple[str, ...]]:
    """(functions, warnings that name the tools that Anthropic's own servers run)."""
    tools, others = [], []
    for tool in fields.objects("tools"):
        if tool.text("type") not in (None, "custom"):
            others.append(tool)
            continue
        tool.needed("name")
        schema = tool.object("input_schema")
        function: dict[str, Any] = {"name": tool.text("name")}
        if description := tool.text("description"):
            function["description"] = description
        tools.append(
            {"type": "function", "function": function | {"parameters": schema.values if schema else {}}}
        )
    return tools or None, left_out(others)


def _read_choice(fields: Fields) -> tuple[str | dict[str, Any], bool]:
    """(tool_choice in the engine's words, whether there may be several calls)."""
    choice = fields.object("tool_choice") or Fields({})
    parallel = choice.flag("disable_parallel_tool_use") is not True
    kind = choice.choice("type", "auto", "none", "any", "tool")
    if kind == "tool":
        choice.needed("name")
        return forced(str(choice.text("name"))), parallel
    return {"none": "none", "any": "required"}.get(kind or "", "auto"), parallel


# ---- out ----


def _event(name: str, **values: Any) -> Event:
    return Event({"type": name, **values}, name)


def _block_events(change: PartChange) -> Iterator[Event]:
    block = change.block
    match change.act:
        case "open":
            yield _event("content_block_start", index=block.index, content_block=_empty(block))
        case "more":
            yield _event("content_block_delta", index=block.index, delta=_delta(block.kind, change.text))
        case "close":
            if block.kind == "thinking":
                delta = {"type": "signature_delta", "signature": _signature(block.text)}
                yield _event("content_block_delta", index=block.index, delta=delta)
            yield _event("content_block_stop", index=block.index)


def _delta(kind: Kind, text: str) -> dict[str, str]:
    match kind:
        case "thinking":
            return {"type": "thinking_delta", "thinking": text}
        case "tool_call":
            return {"type": "input_json_delta", "partial_json": text}
    return {"type": "text_delta", "text": text}


def _empty(block: ContentPart) -> dict[str, Any]:
    match block.kind:
        case "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "tool_call":
            return {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
    return {"type": "text", "text": ""}


def _content(block: ContentPart) -> dict[str, Any]:
    match block.kind:
        case "thinking":
            return _empty(block) | {"thinking": block.text, "signature": _signature(block.text)}
        case "tool_call":
            return _empty(block) | {"input": json.loads(block.text)}
    return {"type": "text", "text": block.text}


def _signature(text: str) -> str:
    """Clients drop thinking that has none; nobody checks it."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _ending(job: Job) -> tuple[str, str | None]:
    reason = job.answer.finish_reason
    if reason == "stop" and job.stop_text is not None:
        return "stop_sequence", job.stop_text
    return STOP_REASONS.get(reason, "end_turn"), None


def _usage(job: Job) -> dict[str, int]:
    stats = job.stats
    return {
        "input_tokens": stats.prompt_tokens - stats.reused_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stats.reused_tokens,
        "output_tokens": stats.generated_tokens,
    }
