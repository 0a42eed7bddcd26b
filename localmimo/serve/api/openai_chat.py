"""Chat: POST /v1/chat/completions, OpenAI's chat dialect, with MiMo's reasoning_content beside it.

Knows the dialect's fields and chunks; nothing of HTTP, of threads or of the other dialects.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from localmimo.chat.partial_call import PartialCall
from localmimo.chat.tokenizer import Tokenizer
from localmimo.decode.options import MAX_LOGPROBS
from localmimo.decode.steps import FinishReason, Stats, Step
from localmimo.serve.api.json_fields import Fields
from localmimo.serve.api.parameters import (
    Request,
    left_out,
    read_options,
    read_thinking,
    read_tool_choice,
    refuse_several,
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

REASONS: dict[FinishReason, str] = {"context": "length", "cancelled": "stop"}
ERROR_TYPES = {"key": "authentication_error", "forbidden": "permission_error", "full": "rate_limit_error"}
CODES = {"context": "context_length_exceeded", "key": "invalid_api_key", "full": "queue_full"}

# The body, as /openapi.json describes it.
FUNCTION = object_of({"name": TEXT, "description": TEXT, "parameters": OBJECT}, "name")
CALL = object_of(
    {"id": TEXT, "type": TEXT, "function": object_of({"name": TEXT, "arguments": TEXT}, "name")}, "function"
)
MESSAGE = object_of(
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": either(TEXT, TEXT_PARTS),
        "reasoning_content": {"type": ["string", "null"]},
        "tool_calls": list_of(CALL),
        "tool_call_id": TEXT,
    },
    "role",
    "content",
)
CHAT = object_of(
    COMMON
    | option_fields("chat")
    | THINKING
    | {
        "messages": list_of(MESSAGE, minItems=1),
        "n": {"const": 1},
        "logprobs": FLAG,
        "tools": list_of(either(typed("function", "function", function=FUNCTION), OTHER_TOOL)),
        "tool_choice": either(
            TOOL_CHOICE, typed("function", "function", function=object_of({"name": TEXT}, "name"))
        ),
        "parallel_tool_calls": FLAG,
        "response_format": either(
            {"type": "null"},
            object_of({"type": {"enum": ["text", "json_object"]}}, "type"),
            typed("json_schema", "json_schema", json_schema=object_of({"schema": OBJECT}, "schema")),
        ),
        "stream_options": object_of({"include_usage": FLAG}),
    },
    "messages",
)


class Chat:
    """One chat request, and the answer's chunks or object."""

    path = "/v1/chat/completions"
    summary = "Answer a conversation (OpenAI's chat)."
    body = CHAT
    error_schema = "OpenAiError"

    def __init__(self, fields: Fields, context: ServerContext) -> None:
        self.request = read_chat(fields)
        options = fields.object("stream_options")
        self._usage_wanted = bool(options and options.flag("include_usage"))
        self._tokenizer = context.tokenizer
        self._calls: list[str] = []  # ids of those that were begun
        self._steps: list[Step] = []  # of an answer that is sent whole, for their log-probabilities
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": context.model,
            "system_fingerprint": "localmimo",
        }

    # ---- stream ----

    def first_events(self, job: Job) -> Iterable[Event]:
        yield self._chunk({"role": "assistant", "content": ""})

    def push(self, step: Step) -> Iterable[Event]:
        if not self.request.stream:
            self._steps.append(step)
            return
        logprobs = self._logprobs([step]) if self.request.options.logprobs is not None else None
        if step.call_part is not None:
            yield self._chunk({"tool_calls": [self._call_delta(step.call_part)]}, logprobs=logprobs)
        elif step.text or logprobs:
            name = "reasoning_content" if step.kind == "thinking" else "content"
            yield self._chunk({name: step.text}, logprobs=logprobs)

    def last_events(self, job: Job) -> Iterable[Event]:
        yield self._chunk({}, reason=finish_reason(job), timings=job.stats.as_dict())
        if self._usage_wanted:
            yield Event(self._object("chat.completion.chunk", []) | {"usage": usage(job)})
        yield Event("[DONE]")

    def broken(self, api_error: ApiError) -> Iterable[Event]:
        yield Event(self.error_body(api_error))

    def pause(self, note: str) -> Event | None:
        return None

    def _call_delta(self, part: PartialCall) -> dict[str, Any]:
        """A piece of a call's arguments; the first one says whose."""
        if known := part.id in self._calls:
            function = {"arguments": part.arguments}
        else:
            self._calls.append(part.id)
            function = {"name": part.name, "arguments": part.arguments}
        head = {} if known else {"id": part.id, "type": "function"}
        return {"index": self._calls.index(part.id), **head, "function": function}

    def _chunk(
        self,
        delta: dict[str, Any],
        *,
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        timings: dict[str, Any] | None = None,
    ) -> Event:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        extra = {} if timings is None else {"timings": timings}
        return Event(self._object("chat.completion.chunk", [choice]) | extra)

    # ---- whole ----

    def whole(self, job: Job) -> dict[str, Any]:
        reply = job.answer
        message: dict[str, Any] = {"role": "assistant", "content": reply.content or None, "refusal": None}
        if not reply.tool_calls:
            message["content"] = reply.content
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in reply.tool_calls]
        logprobs = self._logprobs(self._steps) if self.request.options.logprobs is not None else None
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(job)}
        return self._object("chat.completion", [choice]) | {
            "usage": usage(job),
            "timings": job.stats.as_dict(),
        }

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": kind, "choices": choices}

    def _logprobs(self, steps: Sequence[Step]) -> dict[str, Any] | None:
        """Of the answer's tokens: thinking is not part of the content."""
        drawn = [
            step
            for step in steps
            if step.token is not None and step.logprob is not None and step.kind != "thinking"
        ]
        return {"content": [self._logprob(step) for step in drawn], "refusal": None} if drawn else None

    def _logprob(self, step: Step) -> dict[str, Any]:
        assert step.token is not None and step.logprob is not None
        top = [token_logprob(self._tokenizer, token, value) for token, value in step.top_logprobs]
        return token_logprob(self._tokenizer, step.token, step.logprob) | {"top_logprobs": top}

    @staticmethod
    def error_body(api_error: ApiError) -> dict[str, Any]:
        return openai_error(api_error)


def read_chat(fields: Fields) -> Request:
    """The request that a body holds."""
    fields.needed("messages")
    refuse_several(fields, "n")
    refuse_unknown(fields)
    tools, warnings = read_tools(fields)
    think, budget = read_thinking(fields)
    options = read_options(
        fields,
        "chat",
        tools=tools,
        tool_choice=read_tool_choice(fields),
        parallel_tool_calls=fields.flag("parallel_tool_calls") is not False,
        think=think,
        think_budget=budget,
        logprobs=_read_logprobs(fields),
        response_format=read_format(fields, "response_format"),
    )
    stream = bool(fields.flag("stream"))
    return Request(fields.items("messages"), options=options, stream=stream, warnings=warnings)


def read_tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, tuple[str, ...]]:
    """(functions, warnings that name the other tools)."""
    tools = fields.objects("tools")
    others = []
    for tool in tools:
        if tool.values.get("type") is None and "function" not in tool.values:
            tool.wrong("type", '"function"')
        if tool.text("type") not in (None, "function"):
            others.append(tool)
    functions = [dict(tool.values) for tool in tools if tool not in others]
    return functions or None, left_out(others)


def _read_logprobs(fields: Fields) -> int | None:
    top = fields.count("top_logprobs", 0, MAX_LOGPROBS)
    return top or 0 if fields.flag("logprobs") else None


def read_format(fields: Fields, name: str) -> Mapping[str, Any] | None:
    """What the answer must look like; None where it is free."""
    form = fields.object(name)
    if form is None or form.text("type") in (None, "text"):
        return None
    return form.values


def token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """A token as text and bytes, with its log-probability."""
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def usage(job: Job) -> dict[str, Any]:
    """Tokens read, of these found in the KV cache, and tokens written, of these thought."""
    stats: Stats = job.stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
        "completion_tokens_details": {"reasoning_tokens": job.n_thought},
    }


def finish_reason(job: Job) -> str:
    """Why the answer ended, in OpenAI's words."""
    reason = job.answer.finish_reason
    return REASONS.get(reason, reason)


def openai_error(api_error: ApiError) -> dict[str, Any]:
    """An error as OpenAI's API sends it."""
    kind = ERROR_TYPES.get(
        api_error.kind, "invalid_request_error" if api_error.status < 500 else "server_error"
    )
    code = api_error.code or CODES.get(api_error.kind)
    return {"error": {"message": _message(api_error), "type": kind, "param": api_error.param, "code": code}}


def _message(api_error: ApiError) -> str:
    """The error's sentence. A prompt that is too long is said in OpenAI's words: agents then shorten it."""
    if api_error.overflow is None:
        return api_error.sentence
    n_tokens, context = api_error.overflow
    return (
        f"This model's maximum context length is {context} tokens. However, your messages resulted in {n_tokens} "
        "tokens. Please reduce the length of the messages, or start the server with a longer --context."
    )
