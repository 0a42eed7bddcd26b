"""Token text to thinking, answer and tool calls, for every way of cutting it."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmimo.chat.stream_parser import Delta, StreamParser, parse_message
from localmimo.chat.template import ChatTemplate
from localmimo.chat.tool_call import ToolCall, typed

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "lines": {"type": "integer"},
                    "share": {"type": "number"},
                    "force": {"type": "boolean"},
                    "tags": {"type": "array"},
                    "extra": {"type": ["object", "null"]},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "place": {"$ref": "#/$defs/place"},
                },
                "$defs": {"place": {"type": "object"}},
            },
        },
    },
    {"name": "clock"},
]
WRITE = "<tool_call>\n<function=write>\n<parameter=path>a.txt</parameter>\n</function>\n</tool_call>"
CLOCK = "<tool_call><function=clock></function></tool_call>"

PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=write>", "<function=clock>",
    "<function=nope>", "</function>", "<parameter=path>", "<parameter=lines>", "</parameter>", "3", "a<b",
    "\n", " ", "<", "é", "text", WRITE, CLOCK,
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def parse(pieces: list[str], tools: Any = TOOLS, thinking: bool = False) -> list[Delta]:
    parser = StreamParser(tools, thinking)
    return [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()


def joined(deltas: list[Delta]) -> list[tuple[str, str, str, ToolCall | None]]:
    """Neighbours of one kind put together, so that only what is said counts; a call counts when it is complete."""
    out: list[tuple[str, str, str, ToolCall | None]] = []
    for delta in deltas:
        if delta.part and not delta.tool_call:
            continue
        if out and out[-1][0] == delta.kind and out[-1][3] is None and delta.tool_call is None:
            kind, text, raw, _ = out.pop()
            out.append((kind, text + delta.text, raw + delta.raw, None))
        else:
            out.append((delta.kind, delta.text, delta.raw, delta.tool_call))
    return out


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(
    text=TEXTS, places=st.lists(st.integers(0, 400), max_size=12), thinking=st.booleans(), tools=st.booleans()
)
def test_every_cut_says_the_same(text: str, places: list[int], thinking: bool, tools: bool) -> None:
    given_tools = TOOLS if tools else None
    whole = joined(parse([text], given_tools, thinking))
    assert joined(parse(cut(text, places), given_tools, thinking)) == whole
    assert joined(parse(list(text), given_tools, thinking)) == whole


@given(text=TEXTS | st.text(), thinking=st.booleans(), tools=st.booleans())
def test_nothing_is_lost(text: str, thinking: bool, tools: bool) -> None:
    deltas = parse(list(text), TOOLS if tools else None, thinking)
    assert "".join(delta.raw for delta in deltas) == text
    for delta in deltas:
        assert (
            delta.text in ("", delta.raw)
            or delta.raw.replace("<think>", "").replace("</think>", "") == delta.text
        )
        assert (delta.kind == "tool_call") == (delta.part is not None)
        assert delta.part or not delta.tool_call


VALUES = st.text(st.sampled_from("ab \n<>/=&;é")) | st.sampled_from(
    ["</parameter> x", "<parameter>", "</tool_call>"]
)


@given(
    path=VALUES,
    lines=st.integers(),
    name=st.sampled_from(["mimo-v2.5", "mimo-v2.6"]),
    content=st.text("ab \n"),
)
def test_what_the_template_writes_is_read_back(path: str, lines: int, name: str, content: str) -> None:
    made = ToolCall("write", {"path": path, "lines": lines, "tags": ["<x>", 1], "extra": {"k": None}})
    message = {
        "role": "assistant",
        "content": content,
        "reasoning_content": "why",
        "tool_calls": [made.as_dict()],
    }
    rendered = ChatTemplate.builtin(name).render([message], add_generation_prompt=False)
    said = rendered.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>")
    assert parse_message(said, TOOLS) == (content, "why", [made])


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "n_calls"),
    [
        ("plain", "plain", "", 0),
        ("<think>a</think>b", "b", "a", 0),
        ("\n<think>a</think>\nb", "\n\nb", "a", 0),
        ("<think></think>b", "b", "", 0),
        ("<think>a", "", "a", 0),
        ("a <think>b</think>", "a <think>b</think>", "", 0),  # not at the start: somebody speaks of the tags
        ("a</think>b", "a</think>b", "", 0),
        ("a <b> </c>", "a <b> </c>", "", 0),
        ("a<tool_", "a<tool_", "", 0),
        ("hm " + WRITE, "hm ", "", 1),
        (WRITE + CLOCK + "\n" + WRITE + "after", "\nafter", "", 3),
        ("<think>a" + WRITE, "", "a", 1),
        ("<think>a" + WRITE + "</think>b", "b", "a", 1),
        ("<think>a" + CLOCK + "<think>c</think>d", "d", "ac", 1),
        ("<think>say <tool_call> then</think>b", "b", "say <tool_call> then", 0),
        ("<tool_call>\n<function=nope>\n</function>\n</tool_call>", ..., "", 0),
        ('<tool_call>{"name": "clock"}</tool_call>', ..., "", 0),
        ("<tool_call><function=clock></tool_call>", "", "", 1),  # the function's end is missing, nothing else
        ("<tool_call><function=clock></function>", "", "", 1),  # cut off after all that matters
        ("<tool_call><function=write><parameter=path>a.t", ..., "", 0),  # cut off in a value: not run, shown
        ("<tool_call><function=write><parameter=path>a</function></tool_call>" + CLOCK, ..., "", 1),
        ("<tool_call><function=clock>junk</function></tool_call>", ..., "", 0),
        ("<tool_call> \n <function= clock >\n\n</function> </tool_call>", "", "", 1),
    ],
)
def test_cases(text: str, content: Any, reasoning: str, n_calls: int) -> None:
    said, thought, calls = parse_message(text, TOOLS)
    assert said == (text.removesuffix(CLOCK) if content is ... else content)
    assert thought == reasoning
    assert len(calls) == n_calls


def grown(deltas: list[Delta]) -> dict[str, str]:
    """The arguments of each call, put together from its parts."""
    found: dict[str, str] = {}
    for part in (delta.part for delta in deltas if delta.part):
        assert part.arguments
        found[part.id] = found.get(part.id, "") + part.arguments
    return found


BODIES = st.lists(
    st.sampled_from(
        [
            *(
                "<parameter=path>",
                "<parameter=lines>",
                "<parameter=note>",
                "<parameter=extra>",
                "<parameter=",
            ),
            *(
                "</parameter>",
                "</function>",
                "</tool_call>",
                "<tool_call>",
                "<function=clock>",
                "</",
                "<",
                ">",
            ),
            *("nul", "l", "None", "7", "{}", '"', "\\", "\n", " ", "é\U0001f680", "a"),
        ]
    ),
    max_size=16,
).map("".join)


@given(text=TEXTS | BODIES.map("<tool_call><function=write>{}</function></tool_call>".format), data=st.data())
def test_parts_put_together_are_the_arguments(text: str, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    for pieces in ([text], cut(text, places), list(text)):
        deltas = parse(pieces)
        arguments = grown(deltas)
        for call in (delta.tool_call for delta in deltas if delta.tool_call):
            assert arguments.pop(call.id) == call.arguments_json
        for unfinished in arguments.values():  # what was begun and is no call can't be taken for one
            with pytest.raises(ValueError, match=r"."):
                json.loads(unfinished)


def test_arguments_grow_letter_by_letter() -> None:
    text = (
        '<tool_call>\n<function=write>\n<parameter=path>a </parameter> "b"</parameter>\n'
        "<parameter=lines>12</parameter>\n<parameter=note>null</parameter>\n<parameter=more>x\ny</parameter>\n"
        "</function>\n</tool_call>"
    )
    parts = [delta.part.arguments for delta in parse(list(text)) if delta.part]
    assert parts == [
        *('{"path": "', "a", " ", '</parameter> \\"', "b", '\\"', '"', ', "lines": ', "12", ', "note": '),
        *("null", ', "more": "', "x", "\\n", "y", '"}'),
    ]


def test_a_call_that_is_cut_off_is_shown_after_all() -> None:
    text = "<tool_call><function=write><parameter=path>a.txt</parameter><parameter=lines>1"
    deltas = parse(list(text))
    assert joined(deltas) == [("answer", text, text, None)]
    assert list(grown(deltas).values()) == ['{"path": "a.txt", "lines": ']


@pytest.mark.parametrize("ending", ["", "\n", "\n<", "\n</function", "\n<parameter=lines>"])
def test_a_call_that_is_cut_off_behind_a_closed_parameter_is_no_call(ending: str) -> None:
    """More parameters might have come: it must not run with those that did."""
    text = "<tool_call>\n<function=write>\n<parameter=path>a.txt</parameter>" + ending
    for pieces in ([text], list(text)):
        assert joined(parse(pieces)) == [("answer", text, text, None)]


def test_a_call_without_its_last_tag_is_one() -> None:
    for ending in ("</function>", "</function>\n", "</function>\n</tool_"):
        text = "<tool_call><function=write><parameter=path>a.txt</parameter>" + ending
        calls = parse_message(text, TOOLS)[2]
        assert [call.arguments for call in calls] == ([{"path": "a.txt"}] if ending[-1] != "_" else [])


def test_a_parameter_given_twice_makes_no_call() -> None:
    text = WRITE.replace("</function>", "<parameter=path>b</parameter></function>")
    assert parse_message(text, TOOLS) == (text, "", [])


def test_no_tools_no_calls() -> None:
    assert parse_message(WRITE) == (WRITE, "", [])


def test_inside_an_open_think_of_the_prompt() -> None:
    assert parse_message("a</think>b", thinking=True) == ("b", "a", [])
    assert parse_message("<think>a</think>b", thinking=True) == ("b", "a", [])


def test_text_is_given_out_at_once() -> None:
    parser = StreamParser(TOOLS)
    assert [delta.text for delta in parser.push("The <b")] == ["The <b"]
    assert parser.push("<tool") == []
    assert [delta.text for delta in parser.push("box>")] == ["<toolbox>"]
    assert parser.push("<tool_call><function=wri") == []
    assert [delta.text for delta in parser.push("ng>")] == ["<tool_call><function=wring>"]


def test_a_referenced_schema_counts() -> None:
    text = '<tool_call><function=write><parameter=place>{"x": 1}</parameter></function></tool_call>'
    assert parse_message(text, TOOLS)[2][0].arguments == {"place": {"x": 1}}


def test_a_call_keeps_its_text_and_has_an_id() -> None:
    (call,) = parse_message(WRITE, TOOLS)[2]
    assert call.text == WRITE
    assert call.id.startswith("call_") and call.id != parse_message(WRITE, TOOLS)[2][0].id
    function = {"name": "write", "arguments": '{"path": "a.txt"}'}
    assert call.as_dict() == {"id": call.id, "type": "function", "function": function}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        (" 3 ", {"type": "integer"}, 3),
        ("3.5", {"type": "integer"}, "3.5"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("3", {"type": "number"}, 3),
        ("3.5", {"type": "number"}, 3.5),
        ("1e999", {"type": "number"}, "1e999"),
        ("nan", {"type": "float"}, "nan"),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ("{'a': None}", {"type": "object"}, {"a": None}),
        ("[1, 'x']", {"type": "array"}, [1, "x"]),
        ("{1, 2}", {"type": "array"}, "{1, 2}"),
        ("[1]", {"type": "object"}, "[1]"),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ("null", {"type": ["integer", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        (" 7\n", {"type": "string"}, " 7\n"),
        ("&lt;b&gt;", {"type": "string"}, "&lt;b&gt;"),
        ("7", {}, "7"),
        ("7", None, "7"),
        ("7", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 7),
        ("7", {"type": ["string", "integer"]}, "7"),
        ("7", {"type": "uuid"}, "7"),
    ],
)
def test_typed(text: str, schema: Any, value: Any) -> None:
    assert typed(text, schema) == value
    assert type(typed(text, schema)) is type(value)
