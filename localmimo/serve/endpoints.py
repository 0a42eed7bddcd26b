"""The table of endpoints: routes, the OpenAPI document and the metrics' labels come from it.

A dialect (POST) is a class in `api/`; a GET is a function of this file. Knows the service; nothing of access or queues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from localmimo.serve.api.anthropic_messages import CountTokens, Messages
from localmimo.serve.api.openai_chat import Chat
from localmimo.serve.api.openai_completions import Completions
from localmimo.serve.api.openai_responses import Responses
from localmimo.serve.errors import ApiError
from localmimo.serve.http import static
from localmimo.serve.openapi import describe
from localmimo.serve.response import to_json
from localmimo.serve.service import Service


@dataclass(frozen=True, slots=True)
class Get:
    """An endpoint that is read."""

    path: str
    summary: str
    respond: Callable[[Service, Request], Response]
    media_type: str = "application/json"


def json_response(
    value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    body = to_json(value).encode("utf-8", "replace")
    return Response(body, status, headers, media_type="application/json")


def _health(service: Service, request: Request) -> Response:
    state = service.state
    progress = {"progress": service.loaded} if state == "loading" and service.loaded is not None else {}
    return json_response({"status": state, **progress}, 200 if state in ("ok", "busy") else 503)


def _metrics(service: Service, request: Request) -> Response:
    return PlainTextResponse(service.exposition(), media_type="text/plain; version=0.0.4")


def _models(service: Service, request: Request) -> Response:
    name = service.model
    data = [_facts(service)]
    return json_response(
        {"object": "list", "data": data, "has_more": False, "first_id": name, "last_id": name}
    )


def _model(service: Service, request: Request) -> Response:
    name = request.path_params["model"]
    if name != service.model:
        raise ApiError(
            "missing",
            f"There is no model {name[:80]!r} here; there is {service.model!r}.",
            param="model",
            code="model_not_found",
        )
    return json_response(_facts(service))


def _facts(service: Service) -> dict[str, Any]:
    """The one model, with the keys that clients of OpenAI and of Anthropic read."""
    name = service.model
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created": service.began,
        "created_at": datetime.fromtimestamp(service.began, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "owned_by": "localmimo",
        "context_length": service.engine.context,
    }


def _openapi(service: Service, request: Request) -> Response:
    return json_response(description())


DIALECTS = (Chat, Completions, Responses, Messages, CountTokens)
GETS = (
    Get("/health", "loading with its progress from 0 to 1, ok, busy or stopping.", _health),
    Get("/metrics", "Counters in Prometheus' text format.", _metrics, "text/plain"),
    Get("/v1/models", "The one model, in a list.", _models),
    Get("/v1/models/{model}", "The one model.", _model),
    Get("/openapi.json", "This description.", _openapi),
)
PATHS = frozenset(
    {*(dialect.path for dialect in DIALECTS), *(get.path for get in GETS), *static.FILES}
)  # also the labels of the metrics


def description() -> dict[str, Any]:
    """The OpenAPI document of this table."""
    return describe(DIALECTS, GETS)
