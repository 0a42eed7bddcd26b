"""Answer: the assistant's turn while its steps come in; Message: the finished turn.

Knows steps; nothing of prompts, engines or terminals.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from localmimo.chat.tool_call import ToolCall
from localmimo.decode.steps import FinishReason, Stats, Step
from localmimo.errors import BadRequest
from localmimo.tools.tool import DECLINED, LIMIT_S, MAX_CHARS, Tool


@dataclass(frozen=True, slots=True)
class Message:
    """The assistant's turn. `as_dict` is what goes back into the messages: with the reasoning."""

    content: str
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason = "stop"
    stats: Stats = field(default_factory=Stats)
    role: str = "assistant"
    tools: Mapping[str, Tool] = field(
        default_factory=dict, repr=False, compare=False
    )  # those that can be run

    def as_dict(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return message

    def run_tools(self, *, limit_s: float = LIMIT_S, max_chars: int = MAX_CHARS) -> list[dict[str, Any]]:
        """Run the calls, one after the other; the tool messages that follow this one."""
        return run_calls(self.tool_calls, self.tools, limit_s=limit_s, max_chars=max_chars)


def run_calls(
    calls: Iterable[ToolCall],
    tools: Mapping[str, Tool],
    approve: Callable[[ToolCall], bool] | None = None,
    *,
    limit_s: float = LIMIT_S,
    max_chars: int = MAX_CHARS,
) -> list[dict[str, Any]]:
    """The results as tool messages; a call that is not approved gets a result that says so."""
    results = []
    for call in calls:
        if call.name not in tools:
            raise BadRequest(
                f"{call.name} was given as a schema, not as a function: run it and append a tool message."
            )
        if approve is None or approve(call):
            text = tools[call.name].call(call.arguments, limit_s=limit_s, max_chars=max_chars)
        else:
            text = DECLINED
        results.append(result_message(call, text))
    return results


def result_message(call: ToolCall, text: str) -> dict[str, Any]:
    """A call's result as the message that follows it."""
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text}


@dataclass(slots=True)
class Answer:
    """What has come so far; cancelled until a step says otherwise."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "cancelled"
    stats: Stats | None = None

    @classmethod
    def of(cls, steps: Iterable[Step]) -> "Answer":
        """All the steps of one generation."""
        answer = cls()
        for step in steps:
            answer.add(step)
        return answer

    def add(self, step: Step) -> None:
        self.stats = step.stats
        if step.token is not None:
            self.tokens.append(step.token)
        if step.tool_call is not None:
            self.tool_calls.append(step.tool_call)
        elif step.kind == "thinking":
            self.reasoning += step.text
        else:
            self.content += step.text
        if step.finish_reason is not None:
            self.finish_reason = step.finish_reason

    def message(self, tools: Mapping[str, Tool] | None = None) -> Message:
        """The turn as far as it came; tools: what its calls may be run with."""
        return Message(
            self.content,
            self.reasoning,
            tuple(self.tool_calls),
            tuple(self.tokens),
            self.finish_reason,
            self.stats or Stats(),
            tools=tools or {},
        )
