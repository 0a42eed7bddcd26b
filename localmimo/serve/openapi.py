"""The OpenAPI document of the server's endpoints, for clients and testers.

Knows OpenAPI; the endpoints describe what they take.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol

from localmimo import __version__
from localmimo.serve.api.schema import ANYTHING, OBJECT, TEXT, Schema, object_of

PARAMETER = re.compile(r"\{(\w+)\}")  # of a path
ERRORS = {
    "400": "The request makes no sense, or its prompt is longer than the context.",
    "401": "The API key is missing or wrong.",
    "403": "The host name or the web page's origin is not allowed.",
    "404": "A response that is not kept (any more), another model, or another path.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "429": "As many requests are waiting as may; Retry-After says when to ask again.",
    "503": "The model is still loading, or the server is stopping.",
}
HEADERS = {"x-localmimo-warnings": {"description": "What of the request was left out.", "schema": TEXT}}
SCHEMAS: dict[str, Schema] = {
    "OpenAiError": object_of(
        {"error": object_of({"message": TEXT, "type": TEXT, "param": ANYTHING, "code": ANYTHING}, "message")},
        "error",
    ),
    "AnthropicError": object_of(
        {"type": {"const": "error"}, "error": object_of({"type": TEXT, "message": TEXT}, "type", "message")},
        "error",
    ),
}


class DescribedPost(Protocol):
    """What the document needs of a dialect."""

    path: str
    summary: str
    body: Schema
    error_schema: str


class DescribedGet(Protocol):
    """What the document needs of another endpoint."""

    @property
    def path(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def media_type(self) -> str: ...


def describe(posts: Iterable[type[DescribedPost]], gets: Iterable[DescribedGet]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, Any] = {post.path: {"post": _post(post)} for post in posts}
    paths |= {get.path: {"get": _get(get)} for get in gets}
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


def _get(get: DescribedGet) -> Schema:
    ok = {"description": get.summary, "content": {get.media_type: {"schema": ANYTHING}}}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": TEXT} for name in PARAMETER.findall(get.path)
    ]
    statuses = ("401", "403", "503", *(("404",) if parameters else ()))
    return {
        "summary": get.summary,
        "parameters": parameters,
        "responses": {"200": ok} | _errors("OpenAiError", *statuses),
    }


def _post(post: type[DescribedPost]) -> Schema:
    content: Schema = {"application/json": {"schema": OBJECT}}
    streamed: Schema = {"text/event-stream": {"schema": ANYTHING}}
    return {
        "summary": post.summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": post.body}}},
        "responses": {
            "200": {"description": "The answer.", "headers": HEADERS, "content": content | streamed}
        }
        | _errors(post.error_schema, *ERRORS),
    }


def _errors(name: str, *statuses: str) -> Schema:
    schema = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {status: {"description": ERRORS[status], "content": schema} for status in statuses}
