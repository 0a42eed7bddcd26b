"""Ask: what a client wants, whatever dialect it wrote it in; and the fields that several dialects share.

Knows the engine's options; nothing of HTTP or of how an answer is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from localmimo.decode.options import Sampling
from localmimo.serve.api.json_fields import Fields

GREEDY_BELOW = 1e-4  # a smaller temperature overflows float32, and means the likeliest token anyway
MOST_LOGPROBS = 20
EFFORT_TOKENS = {"minimal": 256, "low": 1024, "medium": 8192}  # of thinking; high and more: no limit


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation to answer, or a text or tokens to continue, with the engine's options."""

    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    tokens: list[int] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    think: bool | None = None
    think_budget: int | None = None
    logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    stream: bool = False


def read_sampling(fields: Fields) -> Sampling:
    """How tokens are drawn; what is not given has the engine's default."""
    given: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 100),
        "top_k": fields.count("top_k", -1, 1 << 31),
        "top_p": fields.number("top_p", 0, 1),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "seed": fields.count("seed", -(1 << 63)),
        "logit_bias": _bias(fields),
    }
    given = {key: value for key, value in given.items() if value is not None}
    if given.get("temperature", 1) < GREEDY_BELOW:
        given["temperature"] = 0.0
    if given.get("top_k") == -1:  # how some clients write "all"
        given["top_k"] = 0
    if given.get("top_p") == 0:  # the likeliest token alone
        given["temperature"] = 0.0
        del given["top_p"]
    return Sampling(**given)


def _bias(fields: Fields) -> dict[int, float] | None:
    biases = fields.object("logit_bias")
    if biases is None:
        return None
    found = {}
    for token in biases.values:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            fields.wrong("logit_bias", f"an object of token ids, and {token[:20]!r} is none")
        found[int(token)] = biases.number(token, -100, 100) or 0.0
    return found


def read_thinking(fields: Fields) -> tuple[bool | None, int | None]:
    """(think or not or as the template says, tokens of thinking at most) of the switches that clients use."""
    think: bool | None = None
    budget: int | None = None
    effort = fields.text("reasoning_effort")
    if effort is None and (reasoning := fields.object("reasoning")):
        effort = reasoning.text("effort")
    if effort is not None:
        think, budget = effort != "none", EFFORT_TOKENS.get(effort)
    if switch := fields.object("thinking"):
        kind = switch.choice("type", "enabled", "disabled", "adaptive", "auto")
        think = {"enabled": True, "disabled": False}.get(kind or "", think)
        budget = switch.count("budget_tokens", 0) if think else None
    if switches := fields.object("chat_template_kwargs"):
        told = switches.flag("enable_thinking")
        think = think if told is None else told
    return think, budget if think is not False else None


def refuse_several(fields: Fields, *names: str) -> None:
    """One answer per request."""
    for name in names:
        if fields.count(name) not in (None, 1):
            fields.wrong(name, "1: this server gives one answer per request")


def read_tool_choice(fields: Fields) -> str | dict[str, Any]:
    """OpenAI's tool_choice in the engine's words; of the chat dialect, or with the name on top."""
    asked = fields.values.get("tool_choice")
    if asked is None or isinstance(asked, str):
        return fields.choice("tool_choice", "auto", "none", "required") or "auto"
    choice = fields.object("tool_choice") or Fields({})
    if choice.text("type") != "function":
        choice.wrong("type", '"function": a choice of one function by its name')
    named = choice.object("function") or choice
    named.needed("name")
    return forced(str(named.text("name")))


def forced(name: str) -> dict[str, Any]:
    """The choice of one function."""
    return {"type": "function", "function": {"name": name}}
