"""Reply: an answer as it has been said so far, put together from the engine's steps.

Knows steps; nothing of dialects or of how they came here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from localmimo.chat import ToolCall
from localmimo.generate import FinishReason, Stats, Step


@dataclass(slots=True)
class Reply:
    """Add each step; ready once one of them had a finish reason."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    n_thought: int = 0  # tokens of thinking
    finish_reason: FinishReason | None = None
    stats: Stats = field(default_factory=Stats)

    def add(self, step: Step) -> None:
        self.stats = step.stats
        if step.token is not None:
            self.tokens.append(step.token)
            self.n_thought += step.kind == "thinking"
        if step.tool_call is not None:
            self.calls.append(step.tool_call)
        elif step.kind == "thinking":
            self.reasoning += step.text
        else:
            self.content += step.text
        self.finish_reason = step.finish_reason or self.finish_reason
