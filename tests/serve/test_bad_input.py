"""Whatever comes in: an error in the dialect's own shape, and a server that answers the next request."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from localmimo.engine import Engine
from localmimo.serve.http.auth import AccessCheck
from localmimo.serve.http.connection import Limits
from tests.serve.running import Running, Scripted, wait_for
from tests.serve.samples import HELLO, PATH

CHAT, TEXT, ITEMS, BLOCKS = PATH, "/v1/completions", "/v1/responses", "/v1/messages"
SAID = {"role": "user", "content": "Hello."}
MESSAGES = {"messages": [SAID], "max_tokens": 2}


def check_shape(path: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    error = body["error"]
    assert error["message"].endswith(".") and "Traceback" not in error["message"]
    if path.startswith(BLOCKS):
        assert body["type"] == "error" and set(error) == {"type", "message"}
    else:
        assert set(body) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["type"].endswith("_error") or error["type"] == "request_too_large"
    return error


@pytest.mark.parametrize("path", [CHAT, TEXT, ITEMS, BLOCKS])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"[]", b'"text"', b"null", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000,
        b'{"messages": ' + b"9" * 5000 + b"}", b'{"model": 7}', b"{}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(server: Running, path: str, body: bytes) -> None:
    answer = server.http.post(path, content=body)
    assert answer.status_code == 400, answer.text
    check_shape(path, 400, answer.json())


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": "Hello"}, "messages is"),
    (CHAT, {"messages": []}, "The conversation is empty"),
    (CHAT, {"messages": [7]}, "Message 1"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "the role 'robot'"),
    (CHAT, {"messages": [{"role": "user", "content": {"a": 1}}]}, "Message 1"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "'image_url'",
    ),
    (
        CHAT,
        {"messages": [SAID, {"role": "tool", "tool_call_id": "x", "content": "y"}]},
        "no tool call is waiting",
    ),
    (CHAT, {"messages": [SAID], "temperature": "hot"}, 'temperature is "hot"'),
    (CHAT, {"messages": [SAID], "temperature": -1}, "between 0 and 100"),
    (CHAT, {"messages": [SAID], "max_tokens": 0}, "at least 1"),
    (CHAT, {"messages": [SAID], "max_tokens": True}, "a whole number"),
    (CHAT, {"messages": [SAID], "stream": "yes"}, "true or false"),
    (CHAT, {"messages": [SAID], "n": 2}, "one answer per request"),
    (CHAT, {"messages": [SAID], "stop": [""]}, "none of them empty"),
    (CHAT, {"messages": [SAID], "logit_bias": {"x": 1}}, "token ids"),
    (CHAT, {"messages": [SAID], "logit_bias": {"99999999": 1}}, "outside the model's vocabulary"),
    (CHAT, {"messages": [SAID], "top_logprobs": 99, "logprobs": True}, "at most 20"),
    (CHAT, {"messages": [SAID], "tools": "x"}, "a list"),
    (CHAT, {"messages": [SAID], "tools": [{"name": "magic"}]}, '"function"'),
    (CHAT, {"messages": [SAID], "tool_choice": "required"}, "asks for a call; the tools are none"),
    (CHAT, {"messages": [SAID], "seed": 10**30}, "at most"),
    (TEXT, {"prompt": ""}, "The prompt is empty"),
    (TEXT, {"prompt": [1, 2, 10**9]}, "outside the model's vocabulary"),
    (TEXT, {"prompt": ["a", "b"]}, "one prompt per request"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "does not fill gaps"),
    (ITEMS, {"input": 7}, "input is 7"),
    (ITEMS, {"input": []}, "The conversation is empty"),
    (ITEMS, {"input": [{"type": "poem"}]}, "function_call_output"),
    (ITEMS, {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "no tool call"),
    (ITEMS, {"input": "x", "tools": [{"name": "web_search"}]}, "type is missing"),
    (CHAT, {"messages": [SAID], "reasoning_effort": "banana"}, "one of none, minimal"),
    (ITEMS, {"input": "x", "reasoning": {"effort": "banana"}}, "one of none, minimal"),
    (BLOCKS, {"messages": [SAID]}, "max_tokens is missing"),
    (BLOCKS, MESSAGES | {"messages": [{"role": "tool", "content": "x"}]}, "role is"),
    (BLOCKS, MESSAGES | {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "text alone"),
    (BLOCKS, MESSAGES | {"system": 5}, "a list"),
    (BLOCKS, MESSAGES | {"thinking": {"type": "perhaps"}}, "one of enabled"),
]


@pytest.mark.parametrize(("path", "body", "says"), WRONG)
def test_wrong_types_are_one_sentence(server: Running, path: str, body: dict[str, Any], says: str) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400, answer.text
    assert says in check_shape(path, 400, answer.json())["message"]


def test_text_that_is_no_text_is_refused_or_answered(server: Running) -> None:
    lone = json.dumps({"messages": [{"role": "user", "content": "\ud800"}], "max_tokens": 2})
    assert server.http.post(CHAT, content=lone).status_code in (200, 400)
    wrong = json.dumps({"messages": [SAID], "temperature": "\udfff"})
    assert server.http.post(CHAT, content=wrong).status_code == 400


@pytest.mark.parametrize("depth", [100, 480, 700, 950, 5000])
def test_nesting(server: Running, depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}'
    call = f'{{"id": "1", "function": {{"name": "f", "arguments": {json.dumps(deep)}}}}}'
    said = '{"role": "user", "content": "x"}'
    for extra in (f'{said}], "tools": [{tool}', f'{said}, {{"role": "assistant", "tool_calls": [{call}]}}'):
        answer = server.http.post(CHAT, content=f'{{"max_tokens": 1, "messages": [{extra}]}}')
        assert answer.status_code in ((200,) if depth == 100 else (200, 400)), answer.text


@pytest.mark.parametrize(
    "schema", [{"type": 5}, {"anyOf": 7}, {"type": {"a": 1}}, {"oneOf": {"a": []}}, 5, None]
)
def test_schemas_that_are_none_make_text(server: Running, script: Scripted, schema: Any) -> None:
    script.say("<tool_call>\n<function=f>\n<parameter=a>1</parameter>\n</function>\n</tool_call>")
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
    said = server.post(CHAT, {"messages": HELLO, "tools": [{"type": "function", "function": function}]})
    (call,) = said.json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": "1"}


def test_unknown_fields_are_ignored(server: Running) -> None:
    body = {
        "messages": [SAID],
        "max_tokens": 2,
        "frobnicate": {"x": [1]},
        "user": "me",
        "service_tier": "auto",
    }
    assert server.post(CHAT, body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_context_says_both_numbers(server: Running, stream: bool) -> None:
    long = {"role": "user", "content": "word " * 6000}
    error = server.post(CHAT, {"messages": [long], "stream": stream}).json()["error"]
    assert (
        error["code"] == "context_length_exceeded"
        and "maximum context length is 4096 tokens" in error["message"]
        and "resulted in 60" in error["message"]
    )
    answer = server.post(ITEMS, {"input": [long], "stream": stream})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    answer = server.post(BLOCKS, {"messages": [long], "max_tokens": 1, "stream": stream})
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.fullmatch(r"prompt is too long: 60\d\d tokens > 4096 maximum", error["message"])
    counted = server.post(f"{BLOCKS}/count_tokens", {"messages": [long]}).json()
    assert counted["error"]["message"] == error["message"]


def test_large_bodies(server: Running) -> None:
    body = b'{"messages": [{"role": "user", "content": "' + b"x" * 10_000_000 + b'"}]}'
    for path in (CHAT, BLOCKS):
        answer = server.http.post(path, content=body)
        assert answer.status_code == 413
        assert "4,194,304" in check_shape(path, 413, answer.json())["message"]
    chunks = (b"x" * 100_000 for _ in range(100))
    assert server.http.post(CHAT, content=chunks).status_code == 413
    assert server.http.get("/health").status_code == 200


def test_unknown_paths_and_methods(server: Running) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404), ("GET", CHAT, 405), ("DELETE", BLOCKS, 405), ("POST", "/health", 405),
        ("GET", "/v1/../etc/passwd", 404), ("POST", f"{BLOCKS}/batches", 404), ("GET", "/page.js/../../app.py", 404),
    ):  # fmt: skip
        answer = server.http.request(method, path)
        assert answer.status_code == status
        check_shape(path, status, answer.json())
    error = server.http.get("/v1/models/other").json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    answer = server.http.get("/v1/models/other", headers={"anthropic-version": "2023-06-01"})
    assert answer.json()["error"]["type"] == "not_found_error"


# ---- who may come in ----


def test_a_key_is_asked_for(engine: Engine) -> None:
    with Running(engine, guard=AccessCheck(api_key="secret")) as server:
        assert server.http.get("/health").status_code == 200
        for path in (CHAT, BLOCKS):
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"x-api-key": "secre"},
                {"authorization": "secret"},
            ):
                answer = server.post(path, MESSAGES, headers=headers)
                assert answer.status_code == 401
                assert check_shape(path, 401, answer.json())["type"] == "authentication_error"
            for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
                assert server.post(path, MESSAGES, headers=headers).status_code == 200
        assert server.http.get("/metrics").status_code == 401
        assert server.http.get("/health", headers={"host": "example.org"}).status_code == 200


def test_other_peoples_pages_and_names_are_refused(server: Running, engine: Engine) -> None:
    evil = {"origin": "https://evil.example"}
    assert server.post(CHAT, MESSAGES, headers=evil).status_code == 403
    assert server.post(CHAT, MESSAGES, headers={"host": "evil.example"}).status_code == 403
    assert server.post(CHAT, MESSAGES, headers={"origin": server.url}).status_code == 200
    answer = server.http.options(CHAT, headers=evil | {"access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in answer.headers
    with Running(engine, guard=AccessCheck(cors=("https://good.example",))) as open_server:
        good = {"origin": "https://good.example"}
        answer = open_server.post(CHAT, MESSAGES, headers=good)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        answer = open_server.http.options(CHAT, headers=good | {"access-control-request-method": "POST"})
        assert answer.status_code == 200
        assert open_server.post(CHAT, MESSAGES, headers=evil).status_code == 403


# ---- the line ----


def test_a_full_line_refuses_and_goes_on(engine: Engine, script: Scripted) -> None:
    script.say(*["word " * 30] * 3)
    script.delay_s = 0.01
    with Running(engine, n_waiting=1) as server:
        first, second = (_begin(server, HELLO) for _ in range(2))
        answer = server.post(CHAT, {"messages": HELLO})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert check_shape(CHAT, 429, answer.json())["code"] == "queue_full"
        answer = server.post(BLOCKS, MESSAGES)
        assert (
            answer.status_code == 429
            and check_shape(BLOCKS, 429, answer.json())["type"] == "rate_limit_error"
        )
        for stream in (first, second):
            assert b"word" in _rest(stream)
        assert server.post(CHAT, {"messages": HELLO}).status_code == 200


def test_who_leaves_is_not_answered(engine: Engine, script: Scripted) -> None:
    script.say("word " * 2000, "Yes.")
    script.delay_s = 0.01
    with Running(engine, n_waiting=2) as server:
        first, second = (_begin(server, HELLO) for _ in range(2))
        wait_for(lambda: server.service.queue.n_waiting == 1)
        second.close()  # leaves the line
        wait_for(lambda: server.service.queue.n_waiting == 0)
        first.close()  # stops being answered
        server.wait_idle()
        script._tokens.clear()
        assert server.post(CHAT, {"messages": HELLO}).json()["choices"][0]["message"]["content"] == "Yes."
        assert "localmimo_cancelled_total 2" in server.http.get("/metrics").text


def test_the_connection_is_kept_alive(engine: Engine, script: Scripted) -> None:
    script.say("one two", "one two")
    script.delay_s = 0.25
    with Running(engine, keep_alive_s=0.1) as server:
        events = server.events(CHAT, {"messages": HELLO})
        assert any(name == ":" and "token" in text for name, text in events)
        assert ("ping", {"type": "ping"}) in server.events(BLOCKS, MESSAGES)


def test_an_engine_that_fails_is_a_500_and_the_next_request_is_served(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Iterator[Any]:
        raise ZeroDivisionError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(server.service.engine, "answer", fail)
        for path, body in ((CHAT, MESSAGES), (BLOCKS, MESSAGES), (CHAT, MESSAGES | {"stream": True})):
            answer = server.post(path, body)
            assert (
                answer.status_code == 500 and "secret" not in check_shape(path, 500, answer.json())["message"]
            )
    assert server.post(CHAT, MESSAGES).status_code == 200


def test_while_loading_only_health_answers() -> None:
    with Running(None) as server:
        assert server.http.get("/health").json() == {"status": "loading"}
        server.service.load(17, 50)
        said = server.http.get("/health")
        assert said.status_code == 503 and said.json() == {"status": "loading", "progress": 0.34}
        for path, body in ((CHAT, MESSAGES), (BLOCKS, MESSAGES)):
            answer = server.post(path, body)
            assert answer.status_code == 503 and "retry-after" in answer.headers
            assert "loading (34%)" in check_shape(path, 503, answer.json())["message"]
        assert server.http.get("/v1/models").status_code == 503
        assert "localmimo_ready 0" in server.http.get("/metrics").text


# ---- connections ----


def _connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def _begin(server: Running, messages: list[Any]) -> socket.socket:
    """A streaming request of which only the head was read."""
    body = json.dumps({"messages": messages, "stream": True}).encode()
    queue = server.service.queue
    before = queue.n_waiting + queue.busy
    client = _connect(server)
    client.sendall(
        b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body))
        + body
    )
    wait_for(lambda: queue.n_waiting + queue.busy > before)
    return client


def _rest(client: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while not data.endswith(b"0\r\n\r\n") and (piece := client.recv(65536)):
            data += piece
    client.close()
    return data


def test_a_thousand_idle_connections_give_way(engine: Engine) -> None:
    with Running(engine, limits=Limits(connections=50)) as server:
        idle = []
        for _ in range(1000):
            idle.append(_connect(server))
            if len(idle) > 200:  # this side has its limits too
                idle.pop(0).close()
        assert server.post(CHAT, MESSAGES).status_code == 200
        assert len(server.server.server_state.connections) <= 51
        for client in idle:
            client.close()


def test_slow_heads_and_header_floods_are_cut_off(engine: Engine) -> None:
    with Running(engine, limits=Limits(head_s=0.3)) as server:
        silent, slow = _connect(server), _connect(server)
        slow.sendall(b"GET /health HTTP/1.1\r\nx-a: ")
        began = time.monotonic()
        while time.monotonic() - began < 5:
            try:
                slow.sendall(b"a")
            except OSError:
                break
            time.sleep(0.05)
        assert time.monotonic() - began < 3
        assert _rest(silent) == b""
        flood = _connect(server)
        flood.sendall(b"GET /health HTTP/1.1\r\n" + b"x-b: y\r\n" * 10_000)
        answer = flood.recv(65536)
        assert answer.startswith(b"HTTP/1.1 400") and b'"message":"Invalid HTTP' in answer
        garbage = _connect(server)
        garbage.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert garbage.recv(65536).startswith(b"HTTP/1.1 400")
        assert server.http.get("/health").status_code == 200


def test_a_reader_that_takes_nothing_is_cut_off(engine: Engine, script: Scripted) -> None:
    script.say("word " * 300, "Yes.")
    with Running(engine, limits=Limits(write_s=0.3), send_buffer=4096) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        body = json.dumps({"messages": HELLO, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (
            CHAT.encode(),
            len(body),
        )
        client.sendall(head + body)
        connections = server.server.server_state.connections
        wait_for(lambda: len(connections) == 1)
        wait_for(lambda: not connections)
        server.wait_idle()
        script._tokens.clear()
        assert server.post(CHAT, {"messages": HELLO}).status_code == 200
        client.close()
