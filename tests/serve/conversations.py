"""A ten-turn tool conversation with thinking, as the model says it and as a client of each dialect sends it back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

from tests.serve.running import Running

N_TURNS = 10
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
QUESTION = "How will the weather be in the north?"


def turns() -> Iterator[str]:
    """What the model says: odd white space and numbers that no template would write back the same."""
    for n in range(N_TURNS - 1):
        think = f"<think>\nI need city {n}.\n</think>\n\n" if n % 3 else ""
        yield (
            f"{think}Looking up number {n}. \n<tool_call>\n<function=get_weather>\n"
            f"<parameter=city>City {n}</parameter>\n"
            f"<parameter=days>0{n}</parameter></function>\n</tool_call>"
        )
    yield "<think>Now I know.</think>Rain in all of them.\n"


class Client(Protocol):
    """Keeps a conversation in one dialect."""

    def request(self, server: Running) -> tuple[int, int, int]:
        """Send the conversation and take the answer in: tokens of (prompt, of these cached, answer)."""
        ...


class ChatClient:
    """OpenAI's chat; drops the thinking, as most of its clients do, unless told to keep it."""

    def __init__(self, keep_thinking: bool = True) -> None:
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
        self._keep = keep_thinking

    def request(self, server: Running) -> tuple[int, int, int]:
        function = {"name": "get_weather", "parameters": SCHEMA}
        body = {"messages": self.messages, "tools": [{"type": "function", "function": function}]}
        said = server.post("/v1/chat/completions", body).raise_for_status().json()
        message = said["choices"][0]["message"]
        if not self._keep:
            message.pop("reasoning_content", None)
        self.messages.append(message)
        for call in message.get("tool_calls", ()):
            assert json.loads(call["function"]["arguments"])["city"].startswith("City")
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": "rain"})
        usage = said["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return usage["prompt_tokens"], cached, usage["completion_tokens"]


class MessagesClient:
    """Anthropic's messages; sends the content blocks back as they came."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]

    def request(self, server: Running) -> tuple[int, int, int]:
        tool = {"name": "get_weather", "input_schema": SCHEMA}
        body = {"messages": self.messages, "tools": [tool], "max_tokens": 500}
        said = server.post("/v1/messages", body).raise_for_status().json()
        self.messages.append({"role": "assistant", "content": said["content"]})
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "rain"}]}
            for block in said["content"]
            if block["type"] == "tool_use"
        ]
        self.messages.append({"role": "user", "content": results or "Thanks."})
        usage = said["usage"]
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, cached, usage["output_tokens"]


class ResponsesClient:
    """OpenAI's responses; sends all items back, or only the new ones with the id of the last response."""

    def __init__(self, by_id: bool) -> None:
        self.items: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
        self._by_id = by_id
        self._last: str | None = None

    def request(self, server: Running) -> tuple[int, int, int]:
        tool = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
        body = {"input": self.items, "tools": [tool], "previous_response_id": self._last}
        said = server.post("/v1/responses", body).raise_for_status().json()
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}
            for item in said["output"]
            if item["type"] == "function_call"
        ]
        if self._by_id:
            self._last, self.items = said["id"], results
        else:
            self.items += said["output"] + results
        usage = said["usage"]
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"], usage["output_tokens"]


class CompletionsClient:
    """The text dialect: the prompt grows by what was said."""

    def __init__(self) -> None:
        self.text = QUESTION

    def request(self, server: Running) -> tuple[int, int, int]:
        said = (
            server.post("/v1/completions", {"prompt": self.text, "max_tokens": 500}).raise_for_status().json()
        )
        self.text += said["choices"][0]["text"] + "<|im_end|>\nrain\n"
        usage = said["usage"]
        return (
            usage["prompt_tokens"],
            usage["prompt_tokens_details"]["cached_tokens"],
            usage["completion_tokens"],
        )
