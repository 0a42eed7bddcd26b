"""The official Python clients of OpenAI and Anthropic against a running server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.running import Running, Scripted
from tests.serve.samples import CALL, CUT_OFF, HELLO, WEATHER

openai = pytest.importorskip("openai", reason="the package openai is not installed")
anthropic = pytest.importorskip("anthropic", reason="the package anthropic is not installed")

THOUGHT = "<think>Hm, rivers.</think>They flow."
TOOL = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}


@pytest.fixture
def gpt(server: Running) -> "openai.OpenAI":
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(server: Running) -> "anthropic.Anthropic":
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def test_openai_chat(gpt: "openai.OpenAI", script: Scripted) -> None:
    script.say(THOUGHT)
    said = gpt.chat.completions.create(model="random-tiny", messages=HELLO)
    assert said.choices[0].message.content == "They flow."
    assert said.choices[0].message.reasoning_content == "Hm, rivers."  # beyond OpenAI's own fields
    assert [model.id for model in gpt.models.list()] == ["random-tiny"]


def test_openai_chat_stream_with_tools(gpt: "openai.OpenAI", script: Scripted) -> None:
    script.say(THOUGHT + CALL)
    with gpt.chat.completions.stream(model="m", messages=HELLO, tools=[WEATHER]) as stream:
        said = stream.get_final_completion()
    (call,) = said.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 2}
    assert said.choices[0].finish_reason == "tool_calls"


def test_openai_completions(gpt: "openai.OpenAI", script: Scripted) -> None:
    script.say(" there was a river.", " there was")
    said = gpt.completions.create(model="m", prompt="Once upon a time", echo=True)
    assert said.choices[0].text == "Once upon a time there was a river."
    stream = gpt.completions.create(model="m", prompt="Once upon a time", stream=True, logprobs=1)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.text for choice in chunks) == " there was"
    assert [choice.logprobs.tokens for choice in chunks[:-1]] and chunks[-1].finish_reason == "stop"


def test_openai_responses(gpt: "openai.OpenAI", script: Scripted) -> None:
    script.say(THOUGHT + CALL, THOUGHT)
    tool = {"type": "function", **WEATHER["function"]}
    said = gpt.responses.create(model="m", input="Weather?", instructions="Be brief.", tools=[tool])
    assert [item.type for item in said.output] == ["reasoning", "message", "function_call"]
    assert said.output_text == "They flow." and said.status == "completed"
    result = {"type": "function_call_output", "call_id": said.output[2].call_id, "output": "rain"}
    again = gpt.responses.create(model="m", input=[result], previous_response_id=said.id, tools=[tool])
    assert again.output_text == "They flow."
    with pytest.raises(openai.NotFoundError, match="not kept here"):
        gpt.responses.create(model="m", input="?", previous_response_id="resp_unknown")


def test_openai_responses_stream(gpt: "openai.OpenAI", script: Scripted) -> None:
    script.say(THOUGHT + CALL)
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    with gpt.responses.stream(model="m", input="Weather?", tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        said = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert "response.reasoning_text.delta" in kinds and "response.function_call_arguments.done" in kinds
    assert said.output_text == "They flow."
    assert json.loads(said.output[2].arguments) == {"city": "Oslo", "days": 2}


def test_anthropic_messages(claude: "anthropic.Anthropic", script: Scripted) -> None:
    script.say(THOUGHT + CALL, "one two three")
    messages = [{"role": "user", "content": "Weather?"}]
    said = claude.messages.create(
        model="m", max_tokens=100, system="Be brief.", messages=messages, tools=[TOOL]
    )
    assert [block.type for block in said.content] == ["thinking", "text", "tool_use"]
    assert said.content[2].input == {"city": "Oslo", "days": 2} and said.stop_reason == "tool_use"
    said = claude.messages.create(model="m", max_tokens=100, messages=messages, stop_sequences=[" three"])
    assert (said.stop_reason, said.stop_sequence, said.content[0].text) == (
        "stop_sequence",
        " three",
        "one two",
    )
    assert claude.messages.count_tokens(model="m", messages=messages).input_tokens == (
        said.usage.input_tokens + said.usage.cache_read_input_tokens
    )
    assert claude.models.list().data[0].id == "random-tiny"


def test_anthropic_stream(claude: "anthropic.Anthropic", script: Scripted) -> None:
    script.say(THOUGHT + CALL)
    messages = [{"role": "user", "content": "Weather?"}]
    with claude.messages.stream(model="m", max_tokens=100, messages=messages, tools=[TOOL]) as stream:
        texts = "".join(stream.text_stream)
        said = stream.get_final_message()
    assert texts == "They flow." and said.content[0].thinking == "Hm, rivers." and said.content[0].signature
    assert said.content[2].input == {"city": "Oslo", "days": 2}
    assert said.stop_reason == "tool_use" and said.usage.output_tokens > 5


def test_a_call_that_is_cut_off_can_be_told_from_a_real_one(
    gpt: "openai.OpenAI", claude: "anthropic.Anthropic", script: Scripted
) -> None:
    """A stream has begun it: its JSON has no end, and what was written follows as text, as without a stream."""
    script.say(*[CUT_OFF] * 6)
    chunks = [*gpt.chat.completions.create(model="m", messages=HELLO, tools=[WEATHER], stream=True)]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    begun = "".join(delta.tool_calls[0].function.arguments for delta in deltas if delta.tool_calls)
    assert begun.startswith('{"city": "') and not begun.endswith("}")
    assert "".join(delta.content or "" for delta in deltas) == CUT_OFF
    assert chunks[-1].choices[0].finish_reason == "stop"
    whole = gpt.chat.completions.create(model="m", messages=HELLO, tools=[WEATHER]).choices[0].message
    assert whole.content == CUT_OFF and not whole.tool_calls

    tool = {"type": "function", "strict": False, **WEATHER["function"]}
    with gpt.responses.stream(model="m", input="Weather?", tools=[tool]) as stream:
        items = stream.get_final_response().output
    assert [(item.type, item.status) for item in items] == [
        ("message", "completed"), ("function_call", "incomplete"), ("message", "completed")
    ]  # fmt: skip
    assert [item.type for item in gpt.responses.create(model="m", input="?", tools=[tool]).output] == [
        "message"
    ]

    messages = [{"role": "user", "content": "Weather?"}]
    with claude.messages.stream(model="m", max_tokens=100, messages=messages, tools=[TOOL]) as stream:
        said = stream.get_final_message()
    assert [block.type for block in said.content] == ["text", "tool_use", "text"]
    assert said.stop_reason == "end_turn" and said.content[0].text + said.content[2].text == CUT_OFF
    said = claude.messages.create(model="m", max_tokens=100, messages=messages, tools=[TOOL])
    assert [block.type for block in said.content] == ["text"]


def test_the_example(server: Running, script: Scripted) -> None:
    script.say(THOUGHT)
    example = Path(__file__).parents[2] / "examples/client.py"
    done = subprocess.run(
        [sys.executable, example, f"{server.url}/v1"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("Hm, rivers.They flow.\n{"), done.stderr


def test_their_errors(gpt: "openai.OpenAI", claude: "anthropic.Anthropic") -> None:
    long = "word " * 5000
    with pytest.raises(openai.BadRequestError) as refused:
        gpt.chat.completions.create(model="m", messages=[{"role": "user", "content": long}])
    assert refused.value.code == "context_length_exceeded"
    assert "4096" in str(refused.value) and "resulted in 50" in str(refused.value)
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: 50\d\d tokens > 4096"):
        claude.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": long}])
    with pytest.raises(anthropic.BadRequestError, match="unknown type|text or tool_result"):
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
        claude.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": [image]}])
