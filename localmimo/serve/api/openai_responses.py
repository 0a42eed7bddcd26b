"""Responses: POST /v1/responses, OpenAI's newer dialect, in items.

Knows the dialect's fields and events; nothing of HTTP, of threads or of the other dialects.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from localmimo.chat.messages import join_parts, part_text, placeholder, result_text
from localmimo.decode.steps import Step
from localmimo.serve.api.content_blocks import ContentPart, ContentParts, PartChange
from localmimo.serve.api.json_fields import Fields
from localmimo.serve.api.openai_chat import openai_error
from localmimo.serve.api.parameters import (
    Request,
    left_out,
    read_options,
    read_thinking,
    read_tool_choice,
    refuse_unknown,
)
from localmimo.serve.api.schema import (
    COMMON,
    FLAG,
    OBJECT,
    OTHER_TOOL,
    TEXT,
    THINKING,
    TOOL_CHOICE,
    either,
    list_of,
    object_of,
    option_fields,
    typed,
)
from localmimo.serve.context import ServerContext
from localmimo.serve.errors import ApiError
from localmimo.serve.response import Event
from localmimo.serve.worker import Job

INCOMPLETE = {"length": "max_output_tokens", "context": "max_output_tokens", "cancelled": "cancelled"}
TEXT_PARTS = ("input_text", "output_text", "text")

# The body, as /openapi.json describes it.
RESULT_OUTPUT = either(TEXT, list_of(typed("input_text", "text", text=TEXT)))
RESPONSE = object_of(
    COMMON
    | option_fields("responses")
    | THINKING
    | {
        "input": either(
            TEXT,
            list_of(
                either(
                    object_of(
                        {"role": {"enum": ["user", "assistant", "system", "developer"]}, "content": TEXT},
                        "role",
                        "content",
                    ),
                    typed("reasoning", "summary", summary=list_of(typed("summary_text", "text", text=TEXT))),
                    typed("function_call", "name", name=TEXT, call_id=TEXT, arguments=TEXT),
                    typed("function_call_output", "call_id", call_id=TEXT, output=RESULT_OUTPUT),
                ),
                minItems=1,
            ),
        ),
        "instructions": {"type": ["string", "null"]},
        "previous_response_id": {"type": ["string", "null"]},
        "tools": list_of(
            either(typed("function", "name", name=TEXT, description=TEXT, parameters=OBJECT), OTHER_TOOL)
        ),
        "tool_choice": either(TOOL_CHOICE, typed("function", "name", name=TEXT)),
        "parallel_tool_calls": FLAG,
        "text": object_of(
            {
                "format": either(
                    object_of({"type": {"enum": ["text", "json_object"]}}, "type"),
                    typed("json_schema", "schema", name=TEXT, schema=OBJECT),
                )
            }
        ),
        "store": FLAG,
    },
    "input",
)


class Responses:
    """One request, and the answer's events or object."""

    path = "/v1/responses"
    summary = "Answer items (OpenAI's responses)."
    body = RESPONSE
    error_schema = "OpenAiError"

    def __init__(self, fields: Fields, context: ServerContext) -> None:
        self._id = f"resp_{uuid.uuid4().hex}"
        self._context = context
        self._earlier = _earlier(fields, context)
        self._new = _read_input(fields)
        self._kept = fields.flag("store") is not False
        self.request = _read_ask(fields, [*self._earlier, *self._new])
        self._echoed = _echoed(fields)
        self._created = int(time.time())
        self._blocks = ContentParts(self.request.stream)
        self._items: dict[int, str] = {}  # ids of the output's items
        self._number = 0  # of the next event

    # ---- stream ----

    def first_events(self, job: Job) -> Iterable[Event]:
        response = self._response("in_progress", [], None)
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)

    def push(self, step: Step) -> Iterable[Event]:
        for change in self._blocks.push(step):
            yield from self._changes(change)

    def last_events(self, job: Job) -> Iterable[Event]:
        whole = self.whole(job)
        name = "response.completed" if whole["status"] == "completed" else "response.incomplete"
        yield self._event(name, response=whole)

    def broken(self, api_error: ApiError) -> Iterable[Event]:
        code = openai_error(api_error)["error"]["code"] or "server_error"
        error = {"code": code, "message": openai_error(api_error)["error"]["message"]}
        yield self._event("error", **error, param=api_error.param)
        yield self._event("response.failed", response=self._response("failed", [], None) | {"error": error})

    def pause(self, note: str) -> Event | None:
        return None

    def _changes(self, change: PartChange) -> Iterator[Event]:
        block = change.block
        ticket = {"item_id": self._item_id(block), "output_index": block.index}
        match change.act:
            case "open":
                item = self._item(block, done=False)
                yield self._event("response.output_item.added", output_index=block.index, item=item)
                if block.kind != "tool_call":
                    part = _part(block, "")
                    yield self._event("response.content_part.added", **ticket, content_index=0, part=part)
            case "more" if block.kind == "tool_call":
                yield self._event("response.function_call_arguments.delta", **ticket, delta=change.text)
            case "more":
                delta = {"content_index": 0, "delta": change.text, **_no_logprobs(block)}
                yield self._event(f"response.{_part_kind(block)}.delta", **ticket, **delta)
            case "close":
                yield from self._closed(block, ticket)
                item = self._item(block, done=True)
                yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _closed(self, block: ContentPart, ticket: dict[str, Any]) -> Iterator[Event]:
        if block.kind == "tool_call":
            if block.complete:
                function = {"name": block.name, "arguments": block.text}
                yield self._event("response.function_call_arguments.done", **ticket, **function)
            return
        kind = _part_kind(block)
        yield self._event(
            f"response.{kind}.done", **ticket, content_index=0, text=block.text, **_no_logprobs(block)
        )
        part = _part(block, block.text)
        yield self._event("response.content_part.done", **ticket, content_index=0, part=part)

    def _event(self, event: str, /, **values: Any) -> Event:
        self._number += 1
        return Event({"type": event, "sequence_number": self._number - 1, **values}, event)

    # ---- whole ----

    def whole(self, job: Job) -> dict[str, Any]:
        items = [self._item(block, done=True) for block in self._blocks.done]
        reason = INCOMPLETE.get(job.answer.finish_reason)
        whole = self._response("incomplete" if reason else "completed", items, job)
        if reason:
            whole["incomplete_details"] = {"reason": reason}
        if self._kept:
            self._context.archive.keep(self._id, self._earlier, [*self._new, job.answer.message().as_dict()])
        return whole

    def _response(self, status: str, output: list[Any], job: Job | None) -> dict[str, Any]:
        figures = {} if job is None else {"timings": job.stats.as_dict()}
        return self._echoed | {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._context.model,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "parallel_tool_calls": self.request.options.parallel_tool_calls,
            "store": self._kept,
            "usage": None if job is None else _usage(job),
            **figures,
        }

    def _item_id(self, block: ContentPart) -> str:
        prefix = {"thinking": "rs", "answer": "msg", "tool_call": "fc"}[block.kind]
        return self._items.setdefault(block.index, f"{prefix}_{uuid.uuid4().hex}")

    def _item(self, block: ContentPart, *, done: bool) -> dict[str, Any]:
        status = "in_progress" if not done else "completed" if block.complete else "incomplete"
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.kind == "tool_call":
            call = {"call_id": block.id, "name": block.name, "arguments": block.text if done else ""}
            return item | {"type": "function_call", **call}
        content = [_part(block, block.text)] if done else []
        if block.kind == "thinking":
            return item | {"type": "reasoning", "summary": [], "content": content}
        return item | {"type": "message", "role": "assistant", "content": content}

    @staticmethod
    def error_body(api_error: ApiError) -> dict[str, Any]:
        return openai_error(api_error)


# ---- in ----


def _earlier(fields: Fields, context: ServerContext) -> list[dict[str, Any]]:
    """The conversation that this request goes on with."""
    name = fields.text("previous_response_id")
    if name is None:
        return []
    found = context.archive.find(name)
    if found is None:
        raise ApiError(
            "missing",
            f"The response {name[:80]!r} is not kept here (any more): send the whole conversation as input.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return found


def _read_ask(fields: Fields, messages: list[dict[str, Any]]) -> Request:
    if fields.flag("background"):
        fields.wrong("background", "false: answers are not kept for later")
    refuse_unknown(fields, "prompt", "stop")
    tools, warnings = _read_tools(fields)
    think, budget = read_thinking(fields)
    instructions = fields.text("instructions")
    if instructions:
        messages = [{"role": "system", "content": instructions}, *messages]
    options = read_options(
        fields,
        "responses",
        tools=tools,
        tool_choice=read_tool_choice(fields),
        parallel_tool_calls=fields.flag("parallel_tool_calls") is not False,
        think=think,
        think_budget=budget,
        response_format=_read_format(fields),
    )
    return Request(messages, options=options, stream=bool(fields.flag("stream")), warnings=warnings)


def _read_input(fields: Fields) -> list[dict[str, Any]]:
    """The input's items as messages; what the assistant thought, said and called in a row is one message."""
    fields.needed("input")
    if isinstance(fields.values["input"], str):
        return [{"role": "user", "content": fields.values["input"]}]
    messages: list[dict[str, Any]] = []
    items = fields.objects("input")
    newest = _newest(items)
    for number, item in enumerate(items):
        _add_item(messages, item, is_new=number == newest)
    return messages


def _newest(items: list[Fields]) -> int | None:
    """The index of the user's message that is to be answered; None where it has been."""
    for number in range(len(items) - 1, -1, -1):
        values = items[number].values
        if values.get("type") in (None, "message") and values.get("role") == "user":
            return number
        if values.get("role") == "assistant" or str(values.get("type")).endswith("_call"):
            return None
    return None


def _add_item(messages: list[dict[str, Any]], item: Fields, *, is_new: bool) -> None:
    kind = item.text("type") or "message"
    match kind:
        case "message":
            role = item.choice("role", "user", "assistant", "system", "developer")
            item.needed("role")
            text = _text(item, "content", is_new=is_new)
            if role == "assistant":
                _assistant(messages, "content", "tool_calls")["content"] = text
            else:
                messages.append({"role": role, "content": text})
        case "reasoning":
            text = _text(item, "content") or _text(item, "summary")
            _assistant(messages, "reasoning_content", "content", "tool_calls")["reasoning_content"] = text
        case "function_call":
            _assistant(messages).setdefault("tool_calls", []).append(_read_call(item))
        case _ if kind.endswith("_call_output"):
            messages.append(_result(item, "output"))
        case _ if kind.endswith("_call"):
            _add_other_call(messages, kind, item)
        case "mcp_list_tools" | "mcp_approval_request" | "mcp_approval_response" | "compaction":
            pass  # says nothing that the model could read
        case _:
            item.wrong("type", "message, reasoning, function_call or function_call_output")


def _add_other_call(messages: list[dict[str, Any]], kind: str, item: Fields) -> None:
    """A call of a tool that is no function: custom, or run by another server, which adds its result to the call."""
    values = item.values
    results = [name for name in ("output", "results", "outputs", "result") if values.get(name) is not None]
    known = {"id", "type", "status", "call_id", "name", "server_label", *results}
    arguments = values.get("arguments")
    if arguments is None:
        arguments = {name: value for name, value in values.items() if name not in known}
    name = item.text("name") or kind.removesuffix("_call")
    call = {"name": name, "arguments": arguments}
    call_id = item.text("call_id") or item.text("id") or ""
    _assistant(messages).setdefault("tool_calls", []).append(
        {"id": call_id, "type": "function", "function": call}
    )
    if results and kind != "image_generation_call":  # whose result is a picture
        messages.append({"role": "tool", "tool_call_id": call_id, "content": result_text(values[results[0]])})


def _result(item: Fields, name: str) -> dict[str, Any]:
    call_id = item.text("call_id") or item.text("id")
    return {"role": "tool", "tool_call_id": call_id, "content": result_text(item.values.get(name))}


def _assistant(messages: list[dict[str, Any]], *full: str) -> dict[str, Any]:
    """The assistant's message at the end, a new one where there is none or it has one of these already."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or any(last.get(name) for name in full):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _read_call(item: Fields) -> dict[str, Any]:
    item.needed("name")
    function = {"name": item.text("name"), "arguments": item.values.get("arguments")}
    return {"id": item.text("call_id") or "", "type": "function", "function": function}


def _text(fields: Fields, name: str, *, is_new: bool = False) -> str:
    """Text, or a list of parts joined; empty where there is none. is_new: what is no text is refused."""
    value = fields.values.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for part in fields.objects(name):
        part.text("text")
        text = part_text(part.values)
        if text is None and is_new:
            part.wrong("type", f"one of {', '.join(TEXT_PARTS)}: this server reads text alone")
        texts.append(placeholder(part.values) if text is None else text)
    return join_parts(texts)


def _read_tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, tuple[str, ...]]:
    """(functions, warnings that name the other tools)."""
    tools, others = [], []
    for tool in fields.objects("tools"):
        tool.needed("type")
        if tool.text("type") != "function":
            others.append(tool)
            continue
        tool.needed("name")
        function: dict[str, Any] = {"name": tool.text("name")}
        if description := tool.text("description"):
            function["description"] = description
        schema = tool.object("parameters")
        tools.append(
            {"type": "function", "function": function | {"parameters": schema.values if schema else {}}}
        )
    return tools or None, left_out(others)


def _read_format(fields: Fields) -> dict[str, Any] | None:
    """What the answer must look like, as the chat dialect writes it."""
    text = fields.object("text")
    form = text.object("format") if text else None
    kind = form.choice("type", "text", "json_object", "json_schema") if form else "text"
    if form is None or kind in (None, "text"):
        return None
    if kind == "json_schema":
        form.needed("schema")
        return {"type": kind, "json_schema": {"name": form.text("name"), "schema": form.values["schema"]}}
    return {"type": kind}


def _echoed(fields: Fields) -> dict[str, Any]:
    """What a response repeats of its request."""
    defaults: dict[str, Any] = {
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "previous_response_id": None,
        "reasoning": None,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
    }
    given = {name: fields.values.get(name) for name in defaults}
    return {name: default if given[name] is None else given[name] for name, default in defaults.items()}


# ---- out ----


def _part_kind(block: ContentPart) -> str:
    return "reasoning_text" if block.kind == "thinking" else "output_text"


def _part(block: ContentPart, text: str) -> dict[str, Any]:
    if block.kind == "thinking":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _no_logprobs(block: ContentPart) -> dict[str, Any]:
    return {} if block.kind == "thinking" else {"logprobs": []}


def _usage(job: Job) -> dict[str, Any]:
    stats = job.stats
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.reused_tokens},
        "output_tokens": stats.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": job.n_thought},
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
    }
