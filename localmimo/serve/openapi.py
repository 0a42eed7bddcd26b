"""Openapi: the description of the server's routes that clients and testers read at /openapi.json.

Knows the dialects' fields as the outside sees them; the dialects themselves decide what they take.
"""

from __future__ import annotations

import re
from typing import Any

from localmimo import __version__
from localmimo.serve.api.parameters import MOST_LOGPROBS

Schema = dict[str, Any]
PARAMETER = re.compile(r"\{(\w+)\}")  # of a path

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": ["boolean", "null"]}
ANYTHING: Schema = {}
OBJECT: Schema = {"type": "object"}


def _count(least: int, most: int | None = None) -> Schema:
    return {"type": ["integer", "null"], "minimum": least} | ({} if most is None else {"maximum": most})


def _number(least: float, most: float) -> Schema:
    return {"type": ["number", "null"], "minimum": least, "maximum": most}


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def _either(*choices: Schema) -> Schema:
    return {"anyOf": list(choices)}


def _typed(kind: str, required: str, **properties: Schema) -> Schema:
    """An object that says its type."""
    return _object({"type": {"const": kind}, **properties}, "type", required)


TOOL_CHOICE: Schema = {"enum": ["auto", "none", "required", None]}
STOP = _either(
    {"type": "null"}, {"type": "string", "minLength": 1}, _list({"type": "string", "minLength": 1})
)
TEXT_PARTS = _list(_typed("text", "text", text=TEXT), minItems=1)
SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _count(-1, 1 << 31),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": _count(-(1 << 63), (1 << 63) - 1),
    "logit_bias": {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
}
COMMON: dict[str, Schema] = {"model": {"type": ["string", "null"]}, "stream": FLAG, **SAMPLING}
THINKING: dict[str, Schema] = {
    "thinking": _object({"type": {"enum": ["enabled", "disabled", "adaptive"]}, "budget_tokens": _count(0)}),
    "chat_template_kwargs": _object({"enable_thinking": FLAG}),
}
FUNCTION = _object({"name": TEXT, "description": TEXT, "parameters": OBJECT}, "name")
CALL = _object(
    {"id": TEXT, "type": TEXT, "function": _object({"name": TEXT, "arguments": TEXT}, "name")}, "function"
)

MESSAGE = _object(
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": _either(TEXT, TEXT_PARTS),
        "reasoning_content": {"type": ["string", "null"]},
        "tool_calls": _list(CALL),
        "tool_call_id": TEXT,
    },
    "role",
    "content",
)
CHAT = _object(
    COMMON
    | THINKING
    | {
        "messages": _list(MESSAGE, minItems=1),
        "max_tokens": _count(1),
        "max_completion_tokens": _count(1),
        "stop": STOP,
        "n": {"const": 1},
        "logprobs": FLAG,
        "top_logprobs": _count(0, MOST_LOGPROBS),
        "reasoning_effort": {"enum": ["none", "minimal", "low", "medium", "high", None]},
        "tools": _list(_typed("function", "function", function=FUNCTION)),
        "tool_choice": _either(
            TOOL_CHOICE, _typed("function", "function", function=_object({"name": TEXT}, "name"))
        ),
        "parallel_tool_calls": FLAG,
        "stream_options": _object({"include_usage": FLAG}),
    },
    "messages",
)
COMPLETION = _object(
    COMMON
    | {
        "prompt": _either(TEXT, _list({"type": "integer", "minimum": 0}, minItems=1)),
        "max_tokens": _count(1),
        "stop": STOP,
        "n": {"const": 1},
        "logprobs": _count(0, MOST_LOGPROBS),
        "echo": FLAG,
        "stream_options": _object({"include_usage": FLAG}),
    },
    "prompt",
)
RESULT_OUTPUT = _either(TEXT, _list(_typed("input_text", "text", text=TEXT)))
RESPONSE = _object(
    COMMON
    | {
        "input": _either(
            TEXT,
            _list(
                _either(
                    _object(
                        {"role": {"enum": ["user", "assistant", "system", "developer"]}, "content": TEXT},
                        "role",
                        "content",
                    ),
                    _typed("reasoning", "summary", summary=_list(_typed("summary_text", "text", text=TEXT))),
                    _typed("function_call", "name", name=TEXT, call_id=TEXT, arguments=TEXT),
                    _typed("function_call_output", "call_id", call_id=TEXT, output=RESULT_OUTPUT),
                ),
                minItems=1,
            ),
        ),
        "instructions": {"type": ["string", "null"]},
        "previous_response_id": {"type": ["string", "null"]},
        "max_output_tokens": _count(1),
        "reasoning": _object({"effort": {"enum": ["none", "minimal", "low", "medium", "high", None]}}),
        "tools": _list(_typed("function", "name", name=TEXT, description=TEXT, parameters=OBJECT)),
        "tool_choice": _either(TOOL_CHOICE, _typed("function", "name", name=TEXT)),
        "parallel_tool_calls": FLAG,
        "store": FLAG,
    },
    "input",
)
BLOCK = _either(
    _typed("text", "text", text=TEXT),
    _typed("thinking", "thinking", thinking=TEXT, signature=TEXT),
    _typed("tool_use", "name", id=TEXT, name=TEXT, input=OBJECT),
    _typed("tool_result", "tool_use_id", tool_use_id=TEXT, content=_either(TEXT, TEXT_PARTS), is_error=FLAG),
)
MESSAGES = _object(
    COMMON
    | THINKING
    | {
        "max_tokens": {"type": "integer", "minimum": 1},
        "messages": _list(
            _object(
                {"role": {"enum": ["user", "assistant"]}, "content": _either(TEXT, _list(BLOCK, minItems=1))},
                "role",
                "content",
            ),
            minItems=1,
        ),
        "system": _either(TEXT, TEXT_PARTS),
        "stop_sequences": _list({"type": "string", "minLength": 1}),
        "tools": _list(_object({"name": TEXT, "description": TEXT, "input_schema": OBJECT}, "name")),
        "tool_choice": _either(
            _object({"type": {"enum": ["auto", "none", "any"]}, "disable_parallel_tool_use": FLAG}),
            _typed("tool", "name", name=TEXT, disable_parallel_tool_use=FLAG),
        ),
    },
    "messages",
    "max_tokens",
)

COUNTED = MESSAGES | {"required": ["messages"]}

POSTS = {
    "/v1/chat/completions": ("Answer a conversation (OpenAI's chat).", CHAT, "OpenAiError"),
    "/v1/completions": ("Continue a text (OpenAI's completions).", COMPLETION, "OpenAiError"),
    "/v1/responses": ("Answer items (OpenAI's responses).", RESPONSE, "OpenAiError"),
    "/v1/messages": ("Answer a conversation (Anthropic's messages).", MESSAGES, "AnthropicError"),
    "/v1/messages/count_tokens": ("Tokens of a conversation.", COUNTED, "AnthropicError"),
}
GETS = {
    "/health": ("loading with its progress from 0 to 1, ok, busy or stopping.", "application/json"),
    "/metrics": ("Counters in Prometheus' text format.", "text/plain"),
    "/v1/models": ("The one model, in a list.", "application/json"),
    "/v1/models/{model}": ("The one model.", "application/json"),
    "/openapi.json": ("This description.", "application/json"),
}
ERRORS = {
    "400": "The request makes no sense, or its prompt is longer than the context.",
    "401": "The API key is missing or wrong.",
    "403": "The host name or the web page's origin is not allowed.",
    "404": "A response that is not kept (any more), or another model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "429": "As many requests are waiting as may; Retry-After says when to ask again.",
    "503": "The model is still loading, or the server is stopping.",
}
SCHEMAS: dict[str, Schema] = {
    "OpenAiError": _object(
        {"error": _object({"message": TEXT, "type": TEXT, "param": ANYTHING, "code": ANYTHING}, "message")},
        "error",
    ),
    "AnthropicError": _object(
        {"type": {"const": "error"}, "error": _object({"type": TEXT, "message": TEXT}, "type", "message")},
        "error",
    ),
}


def description() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, Any] = {
        path: {"post": _post(summary, body, error)} for path, (summary, body, error) in POSTS.items()
    }
    for path, (summary, kind) in GETS.items():
        ok = {"description": summary, "content": {kind: {"schema": ANYTHING}}}
        named = [
            {"name": name, "in": "path", "required": True, "schema": TEXT} for name in PARAMETER.findall(path)
        ]
        statuses = ("401", "403", "503", *(("404",) if named else ()))
        paths[path] = {
            "get": {
                "summary": summary,
                "parameters": named,
                "responses": {"200": ok} | _errors("OpenAiError", *statuses),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "localmimo", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _post(summary: str, body: Schema, error: str) -> Schema:
    content: Schema = {"application/json": {"schema": OBJECT}}
    streamed: Schema = {"text/event-stream": {"schema": ANYTHING}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": "The answer.", "content": content | streamed}}
        | _errors(error, *ERRORS),
    }


def _errors(name: str, *statuses: str) -> Schema:
    schema = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {status: {"description": ERRORS[status], "content": schema} for status in statuses}
