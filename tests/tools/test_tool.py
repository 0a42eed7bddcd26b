"""Tools: schemas of functions, calls checked against them, results as text, files of functions, the agent's loop."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from localmimo.agent import run_agent
from localmimo.chat.tool_call import ToolCall
from localmimo.decode.answer import Message
from localmimo.errors import BadRequest
from localmimo.tools.arguments import Mismatch, fit_value
from localmimo.tools.tool import Tool, cut, schema_of, tools_of
from localmimo.tools.tool_file import ToolFile


def weather(
    place: str, days: int = 1, unit: Literal["C", "F"] = "C", at: list[float] | None = None
) -> dict[str, Any]:
    """The weather
    of a place.

    Args:
        place: A town
            or village.
        days (int): How far ahead.
        unit: C: Celsius

    Returns:
        a forecast
    """
    return {"place": place, "days": days, "unit": unit, "at": at}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"description": "A town or village.", "type": "string"},
                "days": {"description": "How far ahead.", "type": "integer", "default": 1},
                "unit": {"description": "C: Celsius", "type": "string", "enum": ["C", "F"], "default": "C"},
                "at": {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "null"}]},
            },
            "required": ["place"],
        },
        "description": "The weather of a place.",
    },
}


def test_a_function_becomes_a_schema() -> None:
    assert Tool.of(weather).schema() == WEATHER


def test_sphinx_docstrings_and_annotated() -> None:
    def f(a: Annotated[int, "said here"], b: str = "") -> None:
        """Does f.

        :param a: not used, the annotation says it
        :param str b: the other
        :returns: nothing
        """

    schema = Tool.of(f).schema()["function"]
    assert schema["description"] == "Does f."
    assert schema["parameters"]["properties"] == {
        "a": {"description": "said here", "type": "integer"},
        "b": {"description": "the other", "type": "string", "default": ""},
    }


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (int | None, {"type": ["integer", "null"]}),
        (list, {"type": "array"}),
        (Sequence[str], {"type": "array", "items": {"type": "string"}}),
        (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (Any, {}),
        (Literal[1, "a"], {"type": ["integer", "string"], "enum": [1, "a"]}),
        (list[dict[str, Any]], {"type": "array", "items": {"type": "object", "additionalProperties": {}}}),
    ],
)
def test_schema_of(annotation: Any, schema: dict[str, Any]) -> None:
    assert schema_of(annotation) == schema


def rest(*numbers: int) -> None: ...
def bare(number) -> None: ...  # type: ignore[no-untyped-def]
def odd(path: Path) -> None: ...
def lost(path: "NoSuchName") -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (rest, "its parameter *numbers: int has no single name"),
        (bare, "its parameter number has no annotation; write number: str."),
        (odd, "its parameter path is of type <class 'pathlib.Path'>; types are str, int"),
        (lost, "The annotations of lost cannot be read (name 'NoSuchName' is not defined)."),
        (lambda x: x, "has no name to call it by"),
    ],
)
def test_functions_that_say_too_little(function: Any, says: str) -> None:
    with pytest.raises(BadRequest) as raised:
        Tool.of(function)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"place": "Oslo"}, '{"place": "Oslo", "days": 1, "unit": "C", "at": null}'),
        ({"place": "Oslo", "days": 2.0, "at": [1, 2.5]}, '{"place": "Oslo", "days": 2, "unit": "C", "at": [1, 2.5]}'),
        ({"place": "Oslo", "days": "3"}, '{"place": "Oslo", "days": 3, "unit": "C", "at": null}'),
        ({}, "error: weather needs place; it was given nothing."),
        ({"place": 7}, "error: place is 7; it must be of type string."),
        ({"place": "Oslo", "days": 1.5}, "error: days is 1.5; it must be of type integer."),
        ({"place": "Oslo", "days": True}, "error: days is True; it must be of type integer."),
        ({"place": "Oslo", "unit": "K"}, "error: unit is 'K'; it must be one of 'C', 'F'."),
        ({"place": "Oslo", "at": "x"}, "error: at is 'x', which fits none of the types that it may have."),
        ({"place": "Oslo", "no": 1}, "error: weather has no parameter no; it has place, days, unit, at."),
    ],
)  # fmt: skip
def test_calls_are_held_against_the_schema(arguments: dict[str, Any], result: str) -> None:
    assert Tool.of(weather).call(arguments) == result


def test_nested_values_say_where() -> None:
    with pytest.raises(Mismatch, match=r"a\[1\]\.k is 's'; it must be of type integer"):
        fit_value([{"k": 1}, {"k": "s"}], schema_of(list[dict[str, int]]), "a")


def fails() -> None:
    raise ValueError("no such thing")


def hangs() -> None:
    time.sleep(60)


async def slow(n: int) -> int:
    await asyncio.sleep(0)
    return n + 1


def long() -> str:
    return "x" * 50_000


def test_a_tools_failure_is_a_result() -> None:
    assert Tool.of(fails).call({}) == "error: ValueError: no such thing"
    began = time.monotonic()
    assert Tool.of(hangs).call({}, limit_s=0.1) == "error: hangs took longer than 0.1 s and was left."
    assert time.monotonic() - began < 10
    assert Tool.of(slow).call({"n": 1}) == "2"
    assert Tool.of(long).call({}, max_chars=1000) == cut("x" * 50_000, 1000)
    assert cut("abcdefgh", 4) == "abc\n[... 4 of 8 characters left out ...]\nh"


def test_functions_tools_and_schemas_mix() -> None:
    schemas, tools = tools_of([weather, Tool.of(fails), {"name": "other"}])
    assert schemas == [WEATHER, Tool.of(fails).schema(), {"name": "other"}] and list(tools) == [
        "weather",
        "fails",
    ]
    assert tools_of(None) == (None, {}) == tools_of([])
    with pytest.raises(BadRequest, match="Two tools are called weather"):
        tools_of([weather, weather])
    with pytest.raises(BadRequest, match="must be a list"):
        tools_of("weather")


# ---- files ----

FILE = """
import os, time
from pathlib import Path
LIMIT = 3
calls = 0

def count(up: int = 1) -> int:
    "Counts its calls."
    global calls
    print("noise")
    calls += up
    return calls

def hang() -> str:
    while True: pass

def die() -> None:
    os._exit(3)

def _private(x: int) -> int: ...
"""


def test_a_file_of_functions(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(FILE)
    file = ToolFile(tmp_path / "tools.py")
    count, _hang, die = file.tools
    assert count.schema()["function"]["description"] == "Counts its calls."
    assert [count.call({}), count.call({"up": 2})] == ["1", "3"]
    assert count.call({"up": "x"}) == "error: up is 'x'; it must be of type integer."
    assert die.call({}) == "error: die ended its process."
    assert count.call({}) == "1"  # another process
    file.close()


def test_a_function_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmimo.tools.tool_file.GRACE_S", 1.0)
    (tmp_path / "tools.py").write_text(FILE)
    file = ToolFile(tmp_path / "tools.py")
    assert file.tools[1].call({}, limit_s=0.2) == "error: hang took longer than 0.2 s."
    assert file._helper._process is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(", "it does not run (SyntaxError: "),
        ("1 / 0", "it does not run (ZeroDivisionError: division by zero)."),
        ("x = 1", "it has no function to call; a public function with annotations is a tool."),
        ("def f(x): ...", "f cannot be a tool: its parameter x has no annotation"),
        ("import os; os._exit(1)", "cannot be opened as tools: it ended without an answer."),
    ],
)
def test_files_that_are_no_tools(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(BadRequest) as raised:
        ToolFile(tmp_path / "bad.py")
    assert says in str(raised.value)
    with pytest.raises(BadRequest, match="There is no file"):
        ToolFile(tmp_path / "none.py")


# ---- agent ----


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments)


def scripted(*turns: Message) -> Callable[[Any], Message]:
    left = list(turns)
    return lambda _messages: left.pop(0)


CALLING = Message("", "why", (call("weather", place="Oslo"), call("fails")), finish_reason="tool_calls")
DONE = Message("Sunny.")
ASKED = [{"role": "user", "content": "Oslo?"}]
TOOLS = tools_of([weather, fails])[1]


def test_an_agent_goes_on_until_it_calls_nothing() -> None:
    run = run_agent(scripted(CALLING, DONE), ASKED, TOOLS, 5)
    assert [message["role"] for message in run.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert run.messages[1]["reasoning_content"] == "why"
    assert run.messages[2]["tool_call_id"] == CALLING.tool_calls[0].id
    assert run.messages[3]["content"] == "error: ValueError: no such thing"
    assert (run.answer, run.n_steps, run.finish_reason) == (DONE, 2, "stop")
    assert ASKED == [{"role": "user", "content": "Oslo?"}]


def test_an_agent_stops_at_its_limit() -> None:
    run = run_agent(scripted(CALLING, CALLING), ASKED, TOOLS, 2)
    assert (run.n_steps, run.finish_reason, run.messages[-1]["role"]) == (2, "max_steps", "assistant")
    with pytest.raises(BadRequest, match="max_steps is 0; it must be at least 1."):
        run_agent(scripted(), ASKED, TOOLS, 0)


def test_an_agents_calls_may_be_declined() -> None:
    run = run_agent(scripted(CALLING, DONE), ASKED, TOOLS, 5, approve=lambda call: call.name != "fails")
    assert run.messages[2]["content"].startswith('{"place"')
    assert run.messages[3]["content"] == "error: the user declined this call."


def test_a_cut_turn_ends_an_agent() -> None:
    run = run_agent(
        scripted(Message("", tool_calls=CALLING.tool_calls, finish_reason="length")), ASKED, TOOLS, 5
    )
    assert run.finish_reason == "length"


def test_a_schema_can_not_be_run() -> None:
    with pytest.raises(BadRequest, match="weather was given as a schema, not as a function"):
        CALLING.run_tools()
