"""Every limit in every state of the parser: thinking, its closing tag, answer, call, grammar."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Event

import pytest

from localmimo import Sampling, load
from localmimo.decode.answer import Answer
from localmimo.engine import Engine
from tests.decode.drafts import drafting
from tests.decode.script import Script

GREEDY = Sampling(temperature=0)
MESSAGES = [{"role": "user", "content": "Tell me about rivers."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}},
    "required": ["name"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
CALL = "<tool_call><function=look><parameter=at>the sea. now</parameter></function></tool_call>"
THOUGHT = "<think>it is wet. so\n\n</think>"
TEXTS = {
    "thinking": THOUGHT + "\n\nRivers run.",
    "closing tag": THOUGHT + "\n\nRivers run.",
    "answer": THOUGHT + "\n\nRivers run. They end.",
    "call": THOUGHT + CALL,
    "grammar": THOUGHT + '{"name": "Ri.v"}',
}
LIMITS = ("budget", "max_tokens", "stop", "cancel", "context", "end")


@pytest.fixture(scope="module")
def mini() -> Iterator[Engine]:
    with load(context=512, draft=3) as engine:
        yield engine


@pytest.fixture
def opened() -> Iterator[Callable[[int], Engine]]:
    with ExitStack() as stack:
        yield lambda context: stack.enter_context(load(context=context, draft=3))


def place(engine: Engine, state: str) -> int:
    """How many tokens of the state's text come before the limit."""
    until = {
        "thinking": "<think>it is",
        "closing tag": THOUGHT,
        "answer": THOUGHT + "\n\nRivers",
        "call": THOUGHT + CALL[:44],
        "grammar": THOUGHT + '{"na',
    }[state]
    return len(engine.encode(until))


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("state", TEXTS)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_in_a_state(
    mini: Engine,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    limit: str,
    state: str,
    depth: int,
) -> None:
    said, n = TEXTS[state], place(mini, state)
    if limit == "context":
        prompt = mini.prompts.build(MESSAGES, TOOLS if state == "call" else None, True).tokens
        mini = request.getfixturevalue("opened")(len(prompt) + n - 1)
    if limit == "end":
        said = mini.decode(mini.encode(said)[:n])
    tokens = mini.encode(said)
    script, cancel = Script(mini, monkeypatch), Event()
    monkeypatch.setattr(script, "_tokens", lambda text: [*mini.encode(text), *mini.encode("<|im_end|>")])
    if limit == "budget" and state == "thinking":  # the tag comes where the budget ends
        tokens = [*tokens[:n], *mini.encode("</think>\n\nRivers run.")]
        said = mini.decode(tokens)
    script.says(said)
    options: dict = {"tools": TOOLS} if state == "call" else {}
    if state == "grammar":
        pytest.importorskip("llguidance")
        options["response_format"] = FORM
    if limit == "budget":
        options["think_budget"] = n if state == "thinking" else len(mini.encode(THOUGHT)) - 1
    if limit == "max_tokens":
        options["max_tokens"] = n
    if limit == "stop":
        options["stop"] = ["."]
    answer = Answer()
    with drafting(mini, depth):
        for step in mini.stream(MESSAGES, think=True, cancel=cancel, sampling=GREEDY, **options):
            answer.add(step)
            if limit == "cancel" and len(answer.tokens) == n:
                cancel.set()
    for text in (answer.content, answer.reasoning):
        assert "think>" not in text
    drawn = mini.decode(answer.tokens)
    assert drawn.count("</think>") <= 1
    if limit in ("max_tokens", "cancel", "context"):
        assert answer.tokens == tokens[:n]
        assert answer.finish_reason == {"max_tokens": "length", "cancel": "cancelled"}.get(limit, limit)
    if limit == "stop":
        assert answer.reasoning == "it is wet. so\n\n"
        expected = {"call": "", "grammar": '{"name": "Ri'}.get(state, "\n\nRivers run")
        assert answer.content == expected
        calls = [{"at": "the sea. now"}] if state == "call" else []
        assert [call.arguments for call in answer.tool_calls] == calls
    if limit == "end":
        assert answer.finish_reason == "stop"
    if limit == "budget":
        assert answer.tokens == tokens and answer.finish_reason in ("stop", "tool_calls")


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("budget", [0, 1, 3, 5, 12])
def test_a_budget_closes_once_and_the_schema_holds(mini: Engine, budget: int, depth: int) -> None:
    pytest.importorskip("llguidance")
    with drafting(mini, depth):
        options = {"think": True, "think_budget": budget, "max_tokens": 140, "sampling": GREEDY}
        done = mini.chat(MESSAGES, response_format=FORM, **options)
        assert done.finish_reason == "length" or set(json.loads(done.content)) == {"name"}
        assert "think>" not in done.content and mini.decode(done.tokens).count("</think>") <= 1
        forced = mini.chat(MESSAGES, tools=TOOLS, tool_choice="required", **options)
        assert forced.content.strip() == "" or forced.finish_reason == "length"
        assert mini.decode(forced.tokens).count("</think>") <= 1
        free = mini.chat(MESSAGES, **options)
        assert "think>" not in free.content and mini.decode(free.tokens).count("</think>") <= 1
