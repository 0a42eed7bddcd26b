"""OpenAI's chat dialect against a running server."""

import json
from typing import Any

import pytest

from localmimo.decode.options import Sampling
from localmimo.engine import Engine
from tests.serve.running import Running, Scripted
from tests.serve.samples import CALL, HELLO, PATH, WEATHER


def joined(events: list[tuple[str | None, Any]], name: str) -> str:
    chunks = [data for _, data in events if isinstance(data, dict) and data["choices"]]
    return "".join(chunk["choices"][0]["delta"].get(name) or "" for chunk in chunks)


def test_an_answer_is_what_the_engine_says(server: Running, engine: Engine) -> None:
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 12, "model": "whatever"}
    said = server.post(PATH, body).json()
    server.wait_idle()
    expected = engine.chat(HELLO, sampling=Sampling(temperature=0), max_tokens=12)
    choice = said["choices"][0]
    assert choice["message"]["content"] == expected.content != ""
    assert choice["finish_reason"] == "length"
    assert said["object"] == "chat.completion" and said["model"] == "random-tiny"
    assert said["usage"]["completion_tokens"] == 12
    assert said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] + 12
    assert said["timings"]["generated_tokens"] == 12


def test_a_stream_says_the_same(server: Running) -> None:
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 12}
    whole = server.post(PATH, body).json()
    events = server.events(PATH, body | {"stream_options": {"include_usage": True}})
    assert events[0][1]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(events, "content") == whole["choices"][0]["message"]["content"]
    last, usage, done = (data for _, data in events[-3:])
    assert last["choices"][0]["finish_reason"] == "length" and last["timings"]["generated_tokens"] == 12
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12
    assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] == usage["usage"]["prompt_tokens"]
    assert done == "[DONE]"
    assert len({data["id"] for _, data in events[:-1]}) == 1
    assert "usage" not in server.events(PATH, body)[-2][1]


def test_a_seed_repeats_an_answer(server: Running) -> None:
    body = {"messages": HELLO, "temperature": 1.0, "seed": 11, "max_completion_tokens": 8}
    first, second = (server.post(PATH, body).json()["choices"][0]["message"]["content"] for _ in range(2))
    assert first == second


def test_thinking_goes_beside_the_answer(server: Running, script: Scripted) -> None:
    script.say("<think>Let me see.</think>It flows.", "<think>Let me see.</think>It flows.")
    said = server.post(PATH, {"messages": HELLO}).json()
    message = said["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "It flows.")
    assert said["choices"][0]["finish_reason"] == "stop"
    assert (
        0
        < said["usage"]["completion_tokens_details"]["reasoning_tokens"]
        < said["usage"]["completion_tokens"]
    )
    events = server.events(PATH, {"messages": HELLO})
    assert joined(events, "reasoning_content") == "Let me see." and joined(events, "content") == "It flows."


def test_a_call_is_a_header_and_then_its_arguments(server: Running, script: Scripted) -> None:
    text = f"<think>I look it up.</think>One moment.{CALL}\n{CALL.replace('Oslo', 'Rome')}"
    script.say(text, text)
    body = {"messages": HELLO, "tools": [WEATHER]}
    said = server.post(PATH, body).json()["choices"][0]
    assert said["finish_reason"] == "tool_calls"
    calls = said["message"]["tool_calls"]
    assert [json.loads(call["function"]["arguments"])["city"] for call in calls] == ["Oslo", "Rome"]
    assert said["message"]["content"].strip() == "One moment."
    deltas = [
        call
        for _, data in server.events(PATH, body)
        if isinstance(data, dict)
        for call in data["choices"][0]["delta"].get("tool_calls", ())
    ]
    headers = [delta for delta in deltas if "id" in delta]
    assert [(delta["index"], delta["function"]["name"]) for delta in headers] == [
        (0, "get_weather"),
        (1, "get_weather"),
    ]
    for index, city in ((0, "Oslo"), (1, "Rome")):
        mine = [delta for delta in deltas if delta["index"] == index]
        assert "id" in mine[0] and len(mine) > 3  # the city comes as it is written
        assert json.loads("".join(delta["function"]["arguments"] for delta in mine)) == {
            "city": city,
            "days": 2,
        }


def test_tool_choice_none_leaves_the_call_as_text(server: Running, script: Scripted) -> None:
    script.say(CALL)
    choice = server.post(PATH, {"messages": HELLO, "tools": [WEATHER], "tool_choice": "none"}).json()[
        "choices"
    ][0]
    assert choice["message"]["content"] == CALL and "tool_calls" not in choice["message"]


def test_logprobs(server: Running) -> None:
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    listed = server.post(PATH, body).json()["choices"][0]["logprobs"]["content"]
    assert len(listed) == 5
    for entry in listed:
        assert len(entry["top_logprobs"]) == 3 and entry["logprob"] <= 0
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert bytes(entry["bytes"]).decode() == entry["token"]
    streamed = [
        entry
        for _, data in server.events(PATH, body)
        if isinstance(data, dict) and data["choices"][0]["logprobs"]
        for entry in data["choices"][0]["logprobs"]["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in listed]


def test_response_format(server: Running) -> None:
    pytest.importorskip("llguidance", reason="the extra grammar is not installed")
    schema = {"enum": ["yes", "no"]}
    form = {"type": "json_schema", "json_schema": {"name": "vote", "schema": schema}}
    said = server.post(PATH, {"messages": HELLO, "response_format": form, "max_tokens": 50}).json()
    assert json.loads(said["choices"][0]["message"]["content"]) in ("yes", "no")
    form = {"format": {"type": "json_schema", "name": "vote", "schema": schema}}
    said = server.post("/v1/responses", {"input": "?", "text": form, "max_output_tokens": 50}).json()
    assert json.loads(said["output"][-1]["content"][0]["text"]) in ("yes", "no")
    for wrong in ({"type": "poem"}, {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}):
        answer = server.post(PATH, {"messages": HELLO, "response_format": wrong, "stream": True})
        assert answer.status_code == 400, answer.text


def test_stop_strings(server: Running, script: Scripted) -> None:
    script.say("one two three four")
    choice = server.post(PATH, {"messages": HELLO, "stop": [" three", "zzz"]}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one two", "stop")


@pytest.mark.parametrize(
    ("switch", "think"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, True),
    ],
)
def test_thinking_switches_reach_the_template(
    server: Running, engine: Engine, script: Scripted, switch: dict[str, Any], think: bool
) -> None:
    script.say("Yes.")
    used = server.post(PATH, {"messages": HELLO} | switch).json()["usage"]["prompt_tokens"]
    assert used == len(engine.encode(engine.render(HELLO, think=think)))


def test_reasoning_is_taken_under_both_names(server: Running, engine: Engine, script: Scripted) -> None:
    for name in ("reasoning_content", "reasoning"):
        script.say("Yes.")
        history = [*HELLO, {"role": "assistant", "content": "They flow.", name: "Hm."}, *HELLO]
        used = server.post(PATH, {"messages": history}).json()["usage"]["prompt_tokens"]
        history[1] = {"role": "assistant", "content": "They flow.", "reasoning_content": "Hm."}
        assert used == len(engine.encode(engine.render(history)))


def test_models_health_and_metrics(server: Running) -> None:
    server.wait_idle()
    assert server.http.get("/health").json() == {"status": "ok"}
    (model,) = server.http.get("/v1/models").json()["data"]
    assert model["id"] == "random-tiny" and model["context_length"] == 4096
    assert server.http.get("/v1/models/random-tiny").json() == model
    missing = server.http.get("/v1/models/gpt")
    assert missing.status_code == 404 and "there is 'random-tiny'" in missing.json()["error"]["message"]
    before = counters(server)
    server.post(PATH, {"messages": HELLO, "max_tokens": 3})
    after = counters(server)
    assert after["localmimo_generated_tokens_total"] == before.get("localmimo_generated_tokens_total", 0) + 3
    name = f'localmimo_requests_total{{path="{PATH}",status="200"}}'
    assert after[name] == before.get(name, 0) + 1
    assert after["localmimo_ready"] == 1 and after["localmimo_queue_limit"] == 8


def counters(server: Running) -> dict[str, float]:
    lines = server.http.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
