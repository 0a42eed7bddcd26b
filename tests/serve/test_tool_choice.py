"""A forced call is a real one: whatever a random model would say, what comes can be read and fits the schema."""

import json
import sys
from typing import Any

import pytest

from localmimo import BadRequest, Sampling
from localmimo.chat.template import ChatTemplate
from localmimo.chat.tool_call import ToolCall
from localmimo.chat.tool_choice import ToolChoice, rules_of_calls
from localmimo.decode.grammar import Grammar, Grammars
from localmimo.engine import Engine
from tests.serve.running import Running, Scripted

pytest.importorskip("llguidance", reason="the extra grammar is not installed")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", 'Bad "Ems"\n<']},
        "days": {"type": "integer", "minimum": 3, "maximum": 9},
        "unit": {"anyOf": [{"$ref": "#/$defs/unit"}, {"type": "null"}]},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days", "unit"],
    "$defs": {
        "unit": {
            "type": "object",
            "properties": {"c": {"type": "boolean"}},
            "required": ["c"],
            "additionalProperties": False,
        }
    },
}
WEATHER = {"name": "get_weather", "parameters": SCHEMA}
NOTE = {
    "name": "note",
    "parameters": {"type": "object", "properties": {"text": {"type": "string"}, "to": {"type": "string"}}},
}
CLOCK = {"name": "clock"}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, CLOCK, NOTE)]
ASKED = [{"role": "user", "content": "How is the weather?"}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SPACES = (" ", "\n", "\t", "\r", "  ")


def fits(arguments: dict[str, Any]) -> bool:
    unit = arguments["unit"]
    return (
        [*arguments] in (["city", "days", "unit"], ["city", "days", "unit", "exact"])
        and arguments["city"] in SCHEMA["properties"]["city"]["enum"]
        and 3 <= arguments["days"] <= 9
        and (unit is None or (isinstance(unit, dict) and unit["c"] in (True, False)))
        and arguments.get("exact") in (None, True, False)
    )


@pytest.fixture(scope="module")
def brief(engine: Engine) -> dict[int, float]:
    """A bias: a random model would write blanks for ever, and never end."""
    end = engine.tokenizer.token_id("<|im_end|>")
    assert end is not None
    return {end: 50.0, **{engine.encode(space)[0]: -50.0 for space in SPACES}}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_random_model_calls(engine: Engine, brief: dict[int, float], choice: Any, seed: int) -> None:
    reply = engine.chat(
        ASKED, tools=TOOLS[:2], tool_choice=choice, think=False, max_tokens=200,
        sampling=Sampling(temperature=1.0, seed=seed, logit_bias=brief),
    )  # fmt: skip
    assert reply.finish_reason == "tool_calls" and not reply.content.strip(), reply
    assert choice == "required" or [call.name for call in reply.tool_calls] == ["get_weather"]
    for call in reply.tool_calls:
        assert call.arguments == {} if call.name == "clock" else fits(call.arguments)


BODIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/chat/completions": ({"messages": ASKED, "tools": TOOLS[:1], "max_tokens": 100}, NAMED),
    "/v1/responses": (
        {"input": "?", "tools": [{"type": "function", **WEATHER}], "max_output_tokens": 100},
        {"type": "function", "name": "get_weather"},
    ),
    "/v1/messages": (
        {
            "messages": ASKED,
            "tools": [{"name": "get_weather", "input_schema": SCHEMA}],
            "max_tokens": 100,
            "thinking": {"type": "disabled"},
        },
        {"type": "tool", "name": "get_weather"},
    ),
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("named", [False, True])
def test_every_dialect_can_force_a_call(
    server: Running, brief: dict[int, float], path: str, named: bool
) -> None:
    body, choice = BODIES[path]
    body = body | {"reasoning_effort": "none", "seed": 5, "logit_bias": {str(k): v for k, v in brief.items()}}
    every: Any = {"type": "any", "disable_parallel_tool_use": True} if "messages" in path else "required"
    body |= {"tool_choice": choice if named else every, "parallel_tool_calls": False}
    said = server.post(path, body).raise_for_status().json()
    (arguments,) = calls(said)
    assert fits(arguments)
    body["tool_choice"] = "sometimes" if "messages" not in path else {"type": "tool", "name": "nobody"}
    refused = server.post(path, body)
    assert refused.status_code == 400 and "tool_choice" in refused.text


def calls(said: dict[str, Any]) -> list[dict[str, Any]]:
    if "choices" in said:
        assert said["choices"][0]["finish_reason"] == "tool_calls"
        listed = said["choices"][0]["message"]["tool_calls"]
        return [json.loads(call["function"]["arguments"]) for call in listed]
    if "output" in said:
        return [json.loads(item["arguments"]) for item in said["output"] if item["type"] == "function_call"]
    assert said["stop_reason"] == "tool_use"
    return [block["input"] for block in said["content"] if block["type"] == "tool_use"]


@pytest.fixture(scope="module")
def grammars(engine: Engine) -> Grammars:
    return Grammars(engine.tokenizer, engine.config.vocab_size)


def follows(grammars: Grammars, engine: Engine, text: str, **options: Any) -> bool:
    """Whether an answer may be this text."""
    rules = rules_of_calls(TOOLS, options.pop("choice", ToolChoice("required")), grammars.spell, **options)
    matcher = grammars.follow(Grammar("lark", rules), thinking=False, may_think=False)._matcher
    tokens = engine.encode(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and bool(matcher.is_accepting())


@pytest.mark.parametrize("name", ["mimo-v2.5", "mimo-v2.6"])
@pytest.mark.parametrize("text", ["", "</parameter", "a\n<b> </function> é", "<tool_response>"])
def test_what_templates_write_may_be_said(grammars: Grammars, engine: Engine, name: str, text: str) -> None:
    weather = ToolCall("get_weather", {"city": 'Bad "Ems"\n<', "days": 4, "unit": {"c": True}})
    made = [ToolCall("note", {"text": text, "to": "me"}), weather, ToolCall("clock", {})]
    turn = {"role": "assistant", "content": "", "tool_calls": [call.as_dict() for call in made]}
    rendered = ChatTemplate.builtin(name).render([turn], add_generation_prompt=False)
    said = rendered.split("</think>")[1].removesuffix("<|im_end|>")
    assert follows(grammars, engine, said) == (text != "<tool_response>")  # a tag is a token of its own
    assert not follows(grammars, engine, said, choice=ToolChoice("required", "note"))
    assert not follows(grammars, engine, "Well. " + said)
    assert not follows(grammars, engine, said.replace("<parameter=days>4", "<parameter=days>12"))


def test_an_answer_in_a_form_or_calls(grammars: Grammars, engine: Engine) -> None:
    call = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"
    form = {"answer": json.dumps({"enum": ["yes", "no"]}), "choice": ToolChoice()}
    assert follows(grammars, engine, '"yes"', **form) and follows(grammars, engine, call, **form)
    assert not follows(grammars, engine, '"maybe"', **form)
    assert not follows(grammars, engine, f'"yes"{call}', **form)


@pytest.mark.parametrize(
    "function",
    [
        {"name": 'a"b\\\n%json{}<é\u0007', "parameters": {"required": 7}},
        {
            "name": "f",
            "parameters": {"properties": {'k"\n': {"enum": ["", '"', "\\", "\u2028", "é", None, 3]}}},
        },
        {"name": "f", "parameters": {"properties": {"k": {"type": "array", "items": {"$ref": "#/nowhere"}}}}},
        {
            "name": "f",
            "parameters": {"properties": {"k": {"type": "object", "not": {}, "x": [1]}, "l": True}},
        },
        {"name": "f", "parameters": {"properties": {"k": {"type": "integer", "minimum": 5, "maximum": 1}}}},
        {"name": "f", "parameters": {"properties": {"k": {"anyOf": [{"$ref": "#"}] * 50}}}},
    ],
)
def test_odd_functions_are_called_or_refused(server: Running, function: dict[str, Any]) -> None:
    body = {"messages": ASKED, "tools": [{"type": "function", "function": function}], "max_tokens": 60}
    answer = server.post("/v1/chat/completions", body | {"tool_choice": "required", "temperature": 0})
    assert answer.status_code in (200, 400), answer.text


def test_one_call_at_a_time(server: Running, engine: Engine, script: Scripted) -> None:
    call = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"
    script.say(f"Now.{call}\n{call}")
    body = {"messages": ASKED, "tools": TOOLS, "parallel_tool_calls": False}
    said = server.post("/v1/chat/completions", body).json()
    assert calls(said) == [{}] and said["choices"][0]["message"]["content"] == "Now."
    message = said["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "noon"}
    script._tokens = []
    script.say("Noon.")
    usage = server.post("/v1/chat/completions", body | {"messages": [*ASKED, message, result]}).json()[
        "usage"
    ]
    assert usage["prompt_tokens_details"]["cached_tokens"] > said["usage"]["prompt_tokens"]


def test_none_keeps_the_prompt_and_makes_no_call(server: Running, engine: Engine) -> None:
    eager = {str(engine.tokenizer.token_id("<tool_call>")): 100}
    body = {"messages": ASKED, "tools": TOOLS, "max_tokens": 8, "logit_bias": eager}
    server.post("/v1/chat/completions", body)
    said = server.post("/v1/chat/completions", body | {"tool_choice": "none"}).json()
    assert "<tool_call>" not in said["choices"][0]["message"]["content"]
    usage = said["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("choice", "tools", "says"),
    [
        ("sometimes", TOOLS, r"tool_choice is sometimes; it must be auto, none, required or"),
        ({"type": "function"}, TOOLS, r"tool_choice is \{'type': 'function'\}; it must be"),
        ("required", None, r"tool_choice asks for a call; the tools are none\."),
        (
            {"type": "function", "function": {"name": "x"}},
            TOOLS,
            r"asks for a call of x; the tools are get_weather, clock",
        ),
    ],
)
def test_choices_that_cannot_be(engine: Engine, choice: Any, tools: Any, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        engine.chat(ASKED, tools=tools, tool_choice=choice)


def test_without_the_extra_it_says_which(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine.__dict__.pop("_constraints", None)
    with pytest.raises(BadRequest, match=r"pip install 'localmimo\[grammar\]'"):
        engine.chat(ASKED, tools=TOOLS, tool_choice="required")
