"""What was sent once is taken back: every kind of earlier turn, in every dialect, is answered."""

import json
from typing import Any

import pytest

from localmimo.engine import Engine
from tests.serve.running import Running, Scripted
from tests.serve.samples import PATH, WEATHER

CUT = '{"path": "letter.txt", "text": "plan.md'
USER = {"role": "user", "content": "Hello."}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
LINE = "[image left out: this model reads text alone]"


def calling(arguments: Any, call_id: str | None = "a") -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def result(call_id: str | None = "a", content: Any = "x") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


CUSTOM = {"id": "a", "type": "custom", "custom": {"name": "apply_patch", "input": "*** Begin"}}
CHAT: list[tuple[list[Any], str]] = [
    ([USER, calling(CUT), result(), USER], f"<parameter=arguments>{CUT}</parameter>"),
    ([USER, calling("null"), result()], "<parameter=arguments>null</parameter>"),
    ([USER, calling("[1]"), result()], "<parameter=arguments>[1]</parameter>"),
    ([USER, calling([1]), result()], "<parameter=arguments>[1]</parameter>"),
    ([USER, calling('{"a": 1}{"a": 2}'), result()], '<parameter=arguments>{"a": 1}{"a": 2}</parameter>'),
    ([USER, calling('{"a": "one\ntwo"}'), result()], "<parameter=a>one\ntwo</parameter>"),
    ([USER, calling(""), result()], "<function=f>\n</function>"),
    ([USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]}, USER], "I will not."),
    ([USER, {"role": "assistant", "content": None, "refusal": "I will not."}, USER], "I will not."),
    (
        [USER, {"role": "assistant", "content": "Hi.", "reasoning_content": None, "reasoning": "Hm."}, USER],
        "<think>Hm.</think>Hi.",
    ),
    ([{"role": "user", "content": [{"type": "text", "text": "See:"}, IMAGE]}, USER], f"See:\n{LINE}"),
    (
        [{"role": "user", "content": [{"type": "file", "file": {"filename": "a.pdf"}}]}, USER],
        "[file a.pdf left out: this model reads text alone]",
    ),
    ([USER, calling("{}"), result(content=[IMAGE])], LINE),
    ([USER, calling("{}"), result(content=None)], "<function=f>"),
    ([USER, calling("{}"), result(content={"type": ["odd"], "n": 1})], '"n": 1'),
    ([USER, {"role": "assistant", "tool_calls": [CUSTOM]}, result()], "<parameter=input>*** Begin</parameter>"),
    ([USER, calling("{}", None), result()], "<function=f>"),
    ([USER, calling("{}"), result(None)], "<function=f>"),
    ([USER, calling("{}"), result(), result()], "<function=f>"),
    ([USER, calling("{}"), result(), calling("{}"), result(), USER], "<function=f>"),
    (
        [USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
         {"role": "function", "name": "f", "content": "x"}],
        "<function=f>",
    ),
]  # fmt: skip
SEARCHED = [
    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "rivers"}},
    {
        "type": "web_search_tool_result",
        "tool_use_id": "s",
        "content": [{"type": "web_search_result", "title": "Nile", "url": "u", "encrypted_content": "zzz"}],
    },
    {"type": "text", "text": "The Nile."},
]
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {"n": 1}}
MESSAGES: list[tuple[list[Any], str]] = [
    ([USER, {"role": "assistant", "content": SEARCHED}, USER], '"title": "Nile"'),
    ([{"role": "user", "content": [PICTURE]}, {"role": "assistant", "content": "Nice."}, USER], LINE),
    ([USER, {"role": "assistant", "content": [USE]},
      {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [PICTURE]}]}], LINE),
    ([USER, {"role": "assistant", "content": [USE]},
      {"role": "user", "content": [{"type": "tool_result", "content": "x"}]}], "<parameter=n>1</parameter>"),
    ([USER, {"role": "assistant", "content": [USE | {"input": CUT}]},
      {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}]}], CUT),
    ([{"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "Deep."}}]}], "Deep."),
]  # fmt: skip
ITEMS: list[tuple[list[Any], str]] = [
    (
        [USER, {"type": "function_call", "call_id": "a", "name": "f", "arguments": CUT},
         {"type": "function_call_output", "call_id": "a", "output": "x"}],
        f"<parameter=arguments>{CUT}</parameter>",
    ),
    (
        [USER, {"type": "custom_tool_call", "call_id": "a", "name": "apply_patch", "input": "*** Begin"},
         {"type": "custom_tool_call_output", "call_id": "a", "output": "done"}],
        "<parameter=input>*** Begin</parameter>",
    ),
    (
        [USER, {"type": "local_shell_call", "call_id": "a", "action": {"type": "exec", "command": ["ls"]}},
         {"type": "local_shell_call_output", "call_id": "a", "output": "a.txt"}],
        "<function=local_shell>",
    ),
    ([USER, {"type": "web_search_call", "id": "w", "action": {"query": "rivers"}}, USER], "rivers"),
    ([{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]},
      {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER], LINE),
]  # fmt: skip
CASES = [
    *((PATH, {"messages": messages}, says) for messages, says in CHAT),
    *(("/v1/messages", {"messages": messages, "max_tokens": 5}, says) for messages, says in MESSAGES),
    *(("/v1/responses", {"input": items}, says) for items, says in ITEMS),
]


@pytest.mark.parametrize(("path", "body", "says"), CASES)
def test_earlier_turns_are_taken(
    server: Running, engine: Engine, script: Scripted, path: str, body: dict[str, Any], says: str
) -> None:
    prompts: list[str] = []
    answer = engine.answer

    def answered(prompt: Any, *args: Any, **options: Any) -> Any:
        prompts.append(prompt.text)
        return answer(prompt, *args, **options)

    script.say("Yes.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "answer", answered)
        said = server.post(path, body)
    assert said.status_code == 200, said.text
    assert says in prompts[0].translate(dict.fromkeys(range(64976, 65008)))
    assert "zzz" not in prompts[0]


NEW = [
    (
        PATH,
        {"messages": [USER, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": [IMAGE]}]},
    ),
    ("/v1/messages", {"messages": [USER, {"role": "user", "content": [PICTURE]}], "max_tokens": 5}),
    (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
    ),
]


@pytest.mark.parametrize(("path", "body"), NEW)
def test_an_image_in_the_newest_message_is_refused(server: Running, path: str, body: dict[str, Any]) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400 and "image" in answer.json()["error"]["message"]


def test_a_call_that_is_cut_off_comes_back(server: Running, script: Scripted) -> None:
    """As a client makes it up from a stream that `max_tokens` ended."""
    script.say("<tool_call><function=get_weather><parameter=city>Oslo is a long word", "Yes.")
    body = {"messages": [USER], "tools": [WEATHER], "max_tokens": 14}
    deltas = [data["choices"][0]["delta"] for _, data in server.events(PATH, body) if data != "[DONE]"]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    script._tokens.clear()
    arguments = "".join(call["function"]["arguments"] for call in calls)
    with pytest.raises(ValueError):
        json.loads(arguments)
    call = {
        "id": calls[0]["id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": arguments},
    }
    again = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result(call["id"]), USER]
    assert server.post(PATH, body | {"messages": again}).status_code == 200
