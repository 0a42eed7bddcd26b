"""The application: the routes, and the checks that every request passes.

Knows HTTP and which dialect has which path; the dialects know the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmimo.serve.api.anthropic_messages import CountTokens, Messages
from localmimo.serve.api.json_fields import Fields
from localmimo.serve.api.openai_chat import openai_error
from localmimo.serve.endpoints import DIALECTS, GETS, PATHS, Get, json_response
from localmimo.serve.errors import ApiError
from localmimo.serve.http import static
from localmimo.serve.http.auth import AccessCheck, body_limit, read_body
from localmimo.serve.response import (
    KEEP_ALIVE_S,
    WARNING_HEADER,
    StreamingResponse,
    reported,
    respond,
    warning_headers,
)
from localmimo.serve.service import Service


class Endpoint:
    """The ASGI endpoint of one dialect: body in, answer out."""

    def __init__(self, service: Service, dialect: type[Any], keep_alive_s: float) -> None:
        self._service = service
        self._dialect = dialect
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._accept(scope, receive)
        except Exception as error:
            api_error = reported(error)
            await respond(send, api_error.status, self._dialect.error_body(api_error), api_error.headers)
            return
        await response(scope, receive, send)

    async def _accept(self, scope: Scope, receive: Receive) -> ASGIApp:
        service = self._service
        body = await read_body(scope, receive, body_limit(service.engine.context))
        dialect = await asyncio.to_thread(self._read, body)
        if isinstance(dialect, CountTokens):
            prompt = await asyncio.to_thread(service.worker.prompt, dialect.request)
            return json_response(dialect.counted(prompt.tokens), headers=warning_headers(dialect.request))
        job, ticket = await service.begin(dialect.request)
        return StreamingResponse(dialect, job, ticket, service.drop, self._keep_alive_s)

    def _read(self, body: bytes) -> Any:
        fields = Fields.of_body(body)
        fields.text("model")
        return self._dialect(fields, self._service.context)


class AccessMiddleware:
    """Middleware: checks access, and counts how each request ended."""

    def __init__(self, app: ASGIApp, access: AccessCheck, service: Service) -> None:
        self._app = app
        self._access = access
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = path if path in PATHS else "other"
                self._service.metrics.answered(known, message["status"])
            await send(message)

        try:
            self._access.check(path, Headers(scope=scope))
        except ApiError as api_error:
            await respond(
                counted, api_error.status, shape(path, api_error, Headers(scope=scope)), api_error.headers
            )
            return
        await self._app(scope, receive, counted)


def shape(path: str, api_error: ApiError, headers: Headers) -> dict[str, Any]:
    """The error as the clients of this path expect it; Anthropic's say so in a header too."""
    found = next((dialect for dialect in DIALECTS if dialect.path == path), None)
    if found is None and (path.startswith(Messages.path + "/") or "anthropic-version" in headers):
        found = Messages
    return found.error_body(api_error) if found else openai_error(api_error)


def make_app(service: Service, access: AccessCheck, keep_alive_s: float = KEEP_ALIVE_S) -> Starlette:
    """The application over one service."""

    async def refused(request: Request, error: Exception) -> Response:
        api_error = _refusal(error, request)
        return json_response(
            shape(request.url.path, api_error, request.headers), api_error.status, api_error.headers
        )

    routes = [
        Route(dialect.path, Endpoint(service, dialect, keep_alive_s), methods=["POST"])
        for dialect in DIALECTS
    ]
    routes += [Route(get.path, _handler(get, service)) for get in GETS]
    routes += static.ROUTES
    middleware = [Middleware(AccessMiddleware, access=access, service=service)]
    if access.cors:
        middleware.insert(0, _cors(access))
    handlers: Mapping[Any, Any] = {HTTPException: refused, ApiError: refused}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _handler(get: Get, service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return get.respond(service, request)

    return handle


def _cors(access: AccessCheck) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=list(access.cors),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["retry-after", WARNING_HEADER],
    )


def _refusal(error: Exception, request: Request) -> ApiError:
    if isinstance(error, ApiError):
        return error
    path, method = request.url.path[:200], request.method
    if isinstance(error, HTTPException) and error.status_code == 405:
        return ApiError("method", f"{path} is not to be had with {method}.")
    return ApiError("missing", f"There is no {path} here; see /openapi.json.")
