"""Answer: the assistant's turn while its steps come in; Message: the turn as it stands in the end.

Knows steps; nothing of prompts, engines or how a turn is shown.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from localmimo.generate import FinishReason, Stats, Step
from localmimo.toolcall import ToolCall


@dataclass(frozen=True, slots=True)
class Message:
    """The assistant's turn. `as_dict` is what goes back into the messages: the reasoning travels along."""

    content: str
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason = "stop"
    stats: Stats = field(default_factory=Stats)
    role: str = "assistant"

    def as_dict(self) -> dict[str, Any]:
        said: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content:
            said["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            said["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return said


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

    def message(self) -> Message:
        """The turn as far as it came."""
        return Message(
            self.content,
            self.reasoning,
            tuple(self.tool_calls),
            tuple(self.tokens),
            self.finish_reason,
            self.stats or Stats(),
        )
