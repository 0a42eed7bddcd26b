"""Optional declarations do not fail a request: what cannot be carried out is left out and named, or refused by name."""

import json
from typing import Any

import pytest

from tests.serve.running import Running
from tests.serve.samples import HELLO, PATH, WEATHER

ITEMS, BLOCKS = "/v1/responses", "/v1/messages"
SHELL = {"type": "function", "name": "shell", "parameters": {"type": "object", "properties": {}}}
CODEX = [
    SHELL,
    {"type": "web_search", "external_web_access": False},
    {
        "type": "custom",
        "name": "apply_patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": "x"},
    },
    {"type": "local_shell"},
    {"type": "namespace", "name": "mcp", "tools": [SHELL]},
]
CUSTOM = {"type": "custom", "custom": {"name": "péché\n"}}
CLAUDE = [{"name": "f", "input_schema": {}}, {"type": "web_search_20250305", "name": "web_search"}]
BODIES: dict[str, dict[str, Any]] = {
    PATH: {"messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"prompt": "A river", "max_tokens": 2},
    ITEMS: {"input": HELLO, "max_output_tokens": 2},
    BLOCKS: {"messages": HELLO, "max_tokens": 2},
}


@pytest.mark.parametrize(
    ("path", "tools", "named", "kept"),
    [
        (ITEMS, CODEX, "web_search, custom apply_patch, local_shell, namespace mcp", ["shell"]),
        (ITEMS, CODEX[1:], "web_search, custom apply_patch, local_shell, namespace mcp", []),
        (PATH, [WEATHER, CUSTOM, {"type": "web_search"}], "custom p?ch??, web_search", ["get_weather"]),
        (BLOCKS, CLAUDE, "web_search_20250305 web_search", ["f"]),
        (f"{BLOCKS}/count_tokens", CLAUDE, "web_search_20250305 web_search", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_cannot_be_run_are_left_out_and_named(
    server: Running, path: str, tools: list[Any], named: str, kept: list[str] | None, stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    offered: list[Any] = []
    worker = server.service.worker
    prompt = worker.prompt
    monkeypatch.setattr(
        worker, "prompt", lambda request: (offered.append(request.options.tools), prompt(request))[1]
    )
    body = BODIES[path.removesuffix("/count_tokens")] | {"tools": tools, "stream": stream}
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-localmimo-warnings"].endswith(f"functions of the client: {named}")
    if kept is not None:
        assert [tool["function"]["name"] for tool in offered[0] or ()] == kept


@pytest.mark.parametrize("path", [path for path in BODIES if "/completions" not in path or "chat" in path])
@pytest.mark.parametrize("kind", ["", " ", " a ", "a\r\nb: c", "\x00", "\ud800", "ü" * 4000])
def test_what_is_left_out_is_named_in_a_legal_header_whatever_it_is_called(
    server: Running, path: str, kind: str
) -> None:
    """Found by random requests: a kind without a character ended the header with a space, which no client may get."""
    tools = [{"type": kind, "name": kind}] * 2
    answer = server.http.post(
        path,
        content=json.dumps(BODIES[path] | {"tools": tools, "stream": False}),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        warning = answer.headers["x-localmimo-warnings"]
        assert warning == warning.strip() and warning.isascii() and warning.isprintable()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [("guided_json", {"type": "object"}), ("min_tokens", 5), ("ignore_eos", True), ("mirostat", 2)],
)
def test_fields_that_would_change_the_answer_are_refused(
    server: Running, path: str, field: str, value: Any
) -> None:
    answer = server.post(path, BODIES[path] | {field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{field} would change the answer")
    assert server.post(path, BODIES[path] | {field: type(value)()}).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_other_fields_are_ignored(server: Running, path: str) -> None:
    others = {
        "metadata": {"a": "b"},
        "user": "me",
        "store": True,
        "prompt_cache_key": "x",
        "typical_p": 1,
        "zzz": [1],
    }
    answer = server.post(path, BODIES[path] | others)
    assert answer.status_code == 200 and "x-localmimo-warnings" not in answer.headers


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max", "banana"])
def test_an_effort_that_does_not_exist_is_refused(server: Running, effort: str) -> None:
    status = 400 if effort == "banana" else 200
    assert server.post(PATH, BODIES[PATH] | {"reasoning_effort": effort}).status_code == status
    assert server.post(ITEMS, BODIES[ITEMS] | {"reasoning": {"effort": effort}}).status_code == status
