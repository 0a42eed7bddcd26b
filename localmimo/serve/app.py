"""App: the routes, and what every request goes through on its way to one.

Knows HTTP and which dialect has which path; the dialects know the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmimo.serve.api.anthropic_messages import CountTokens, Messages
from localmimo.serve.api.json_fields import Fields
from localmimo.serve.api.openai_chat import Chat, openai_failure
from localmimo.serve.api.openai_completions import Completions
from localmimo.serve.api.openai_responses import Responses
from localmimo.serve.errors import ApiError
from localmimo.serve.http import static as pages
from localmimo.serve.http.auth import AccessCheck, body_limit, read_body
from localmimo.serve.openapi import description
from localmimo.serve.response import KEEP_ALIVE_S, StreamingResponse, reported, respond, to_json
from localmimo.serve.service import Service

MODEL = "/v1/models/{model}"
DIALECTS = (Chat, Completions, Responses, Messages, CountTokens)


class Endpoint:
    """The ASGI endpoint of one dialect: body in, answer out."""

    def __init__(self, service: Service, dialect: type[Any], keep_alive_s: float) -> None:
        self._service = service
        self._dialect = dialect
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            delivery = await self._accept(scope, receive)
        except Exception as error:
            failure = reported(error)
            await respond(send, failure.status, self._dialect.failure(failure), failure.headers)
            return
        await delivery(scope, receive, send)

    async def _accept(self, scope: Scope, receive: Receive) -> ASGIApp:
        service = self._service
        body = await read_body(scope, receive, body_limit(service.engine.context))
        dialect = await asyncio.to_thread(self._read, body)
        if isinstance(dialect, CountTokens):
            return _json(
                dialect.counted((await asyncio.to_thread(service.worker.prompt, dialect.ask)).tokens)
            )
        job, place = await service.begin(dialect.ask)
        return StreamingResponse(dialect, job, place, service.drop, self._keep_alive_s)

    def _read(self, body: bytes) -> Any:
        fields = Fields.of_body(body)
        fields.text("model")
        return self._dialect(fields, self._service.desk)


class AccessMiddleware:
    """Middleware: asks the guard, and counts how each request ended."""

    def __init__(self, app: ASGIApp, guard: AccessCheck, service: Service) -> None:
        self._app = app
        self._guard = guard
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = path if path in PATHS else "other"
                self._service.metrics.answered(known, message["status"])
            await send(message)

        try:
            self._guard.check(path, Headers(scope=scope))
        except ApiError as failure:
            await respond(counted, failure.status, shape(path, failure), failure.headers)
            return
        await self._app(scope, receive, counted)


PATHS = frozenset(
    {
        *(dialect.path for dialect in DIALECTS),
        *pages.FILES,
        "/health",
        "/metrics",
        "/v1/models",
        MODEL,
        "/openapi.json",
    }
)


def shape(path: str, failure: ApiError) -> dict[str, Any]:
    """The failure as the clients of this path expect it."""
    found = next((dialect for dialect in DIALECTS if dialect.path == path), None)
    return found.failure(failure) if found else openai_failure(failure)


def make_app(service: Service, guard: AccessCheck, keep_alive_s: float = KEEP_ALIVE_S) -> Starlette:
    """The application over one service."""

    async def health(request: Request) -> Response:
        state = service.state
        known = state == "loading" and service.loaded is not None
        far = {"progress": service.loaded} if known else {}
        return _json({"status": state, **far}, 200 if state in ("ok", "busy") else 503)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.exposition(), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        return _json(_models(service))

    async def model(request: Request) -> Response:
        name = request.path_params["model"]
        if name != service.model:
            raise ApiError("missing", f"There is no model {name[:80]!r} here; there is {service.model!r}.")
        return _json(_model(service))

    async def described(request: Request) -> Response:
        return _json(description())

    async def refused(request: Request, error: Exception) -> Response:
        failure = _refusal(error, request)
        return _json(shape(request.url.path, failure), failure.status, failure.headers)

    routes = [
        Route(dialect.path, Endpoint(service, dialect, keep_alive_s), methods=["POST"])
        for dialect in DIALECTS
    ]
    routes += [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route(MODEL, model),
        Route("/openapi.json", described),
        *pages.ROUTES,
    ]
    middleware = [Middleware(AccessMiddleware, guard=guard, service=service)]
    if guard.cors:
        middleware.insert(0, _cors(guard))
    handlers: Mapping[Any, Any] = {HTTPException: refused, ApiError: refused}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _cors(guard: AccessCheck) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=list(guard.cors),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["retry-after"],
    )


def _refusal(error: Exception, request: Request) -> ApiError:
    if isinstance(error, ApiError):
        return error
    path, method = request.url.path[:200], request.method
    if isinstance(error, HTTPException) and error.status_code == 405:
        return ApiError("method", f"{path} is not to be had with {method}.")
    return ApiError("missing", f"There is no {path} here; see /openapi.json.")


def _models(service: Service) -> dict[str, Any]:
    name = service.model
    data = [_model(service)]
    return {"object": "list", "data": data, "has_more": False, "first_id": name, "last_id": name}


def _model(service: Service) -> dict[str, Any]:
    """The one model, in a shape that the clients of both OpenAI and Anthropic read."""
    name = service.model
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created": service.began,
        "created_at": _date(service.began),
        "owned_by": "localmimo",
        "context_length": service.engine.context,
    }


def _date(seconds: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _json(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = to_json(value).encode("utf-8", "replace")
    return Response(body, status, headers, media_type="application/json")
