"""The agent's loop: the model answers, its calls are run, it reads the results, until it calls nothing more.

Knows messages and tools; nothing of engines: it gets a function that answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from localmimo.chat.tool_call import ToolCall
from localmimo.decode.answer import Message, run_calls
from localmimo.errors import BadRequest
from localmimo.tools.tool import LIMIT_S, MAX_CHARS, Tool

Approve = Callable[[ToolCall], bool]


@dataclass(frozen=True, slots=True)
class Run:
    """What an agent did. `messages` is the whole history, ready to go on with."""

    messages: list[dict[str, Any]]
    answer: Message  # the last turn
    n_steps: int  # turns of the model
    finish_reason: Literal["stop", "max_steps", "length", "context", "cancelled"]


def run_agent(
    chat: Callable[[Sequence[Mapping[str, Any]]], Message],
    messages: Sequence[Mapping[str, Any]],
    tools: Mapping[str, Tool],
    max_steps: int,
    *,
    approve: Approve | None = None,
    limit_s: float = LIMIT_S,
    max_chars: int = MAX_CHARS,
) -> Run:
    """Plan, act, observe. Calls of the last allowed step are not run any more."""
    if max_steps < 1:
        raise BadRequest(f"max_steps is {max_steps}; it must be at least 1.")
    history = [dict(message) for message in messages]
    for n_steps in range(1, max_steps + 1):
        answer = chat(history)
        history.append(answer.as_dict())
        if not answer.tool_calls or answer.finish_reason != "tool_calls":
            reason = "stop" if answer.finish_reason == "tool_calls" else answer.finish_reason
            return Run(history, answer, n_steps, reason)
        if n_steps < max_steps:
            history += run_calls(answer.tool_calls, tools, approve, limit_s=limit_s, max_chars=max_chars)
    return Run(history, answer, max_steps, "max_steps")
