"""The request of a client, in whatever dialect it was written, and readers of the fields that dialects share.

Knows the engine's options; nothing of HTTP or of how an answer is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from localmimo.decode.options import GENERATION_OPTIONS, SAMPLING_OPTIONS, GenerationOptions, Sampling
from localmimo.option import Dialect, Option
from localmimo.serve.api.json_fields import Fields
from localmimo.serve.errors import ApiError

GREEDY_BELOW = 1e-4  # a smaller temperature overflows float32, and means the likeliest token anyway
EFFORT_TOKENS = {"minimal": 256, "low": 1024, "medium": 8192}  # of thinking; high and more: no limit
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

# Fields of other servers that would change the answer, and that are not carried out: refused unless they say what
# happens anyway. All other fields that are not known are ignored.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "length_penalty": (0, 1),
    "modalities": ([], ["text"]),
    "typical_p": (0, 1),
    "tfs_z": (0, 1),
}
NOT_KNOWN = (
    *("add_generation_prompt", "allowed_token_ids", "audio", "bad_words", "chat_template", "conversation"),
    *("documents", "dry_multiplier", "dynatemp_range", "format", "function_call", "functions", "grammar"),
    *("guided_choice", "guided_grammar", "guided_json", "guided_regex", "ignore_eos", "json_schema"),
    *("length_penalty", "min_tokens", "mirostat", "modalities", "num_beams", "regex", "structural_tag"),
    *(
        "structured_outputs",
        "stop_token_ids",
        "tfs_z",
        "top_a",
        "typical_p",
        "use_beam_search",
        "xtc_probability",
    ),
)
INSTEAD = {"functions": "use tools instead", "function_call": "use tool_choice instead"}
INSTEAD |= dict.fromkeys(("guided_json", "json_schema", "format"), "use response_format instead")


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation to answer, or a text or tokens to continue, with the options of the generation."""

    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    tokens: list[int] | None = None
    options: GenerationOptions = field(default_factory=GenerationOptions)
    stream: bool = False
    warnings: tuple[str, ...] = ()  # what of the request was left out


def refuse_unknown(fields: Fields, *names: str) -> None:
    """Refuse the fields that would change the answer and are not known; `names` are those of one dialect."""
    for name in (*NOT_KNOWN, *names):
        value = fields.values.get(name)
        neutral = WITHOUT_EFFECT.get(name, (False, 0, "", [], {}))
        if value is not None and value not in neutral:
            advice = INSTEAD.get(name, "leave it out")
            raise ApiError(
                "invalid",
                f"{name} would change the answer, and this server does not know it: {advice}.",
                param=name,
            )


def left_out(tools: Iterable[Fields]) -> tuple[str, ...]:
    """The warning that names tools which are not offered to the model."""
    names = []
    for tool in tools:
        name = tool.values.get("name")
        custom = tool.values.get("custom")
        name = custom.get("name") if name is None and isinstance(custom, dict) else name
        kind = str(tool.values.get("type"))[:60]
        names.append(f"{kind} {name[:60]}" if isinstance(name, str) and name != kind else kind)
    if not names:
        return ()
    return (f"tools left out, this server runs only functions of the client: {', '.join(names)}",)


def read_options(fields: Fields, dialect: Dialect, **read: Any) -> GenerationOptions:
    """The options of a request: those that a dialect has `read` by itself, and the rest as they are declared.

    What is not given has the engine's default.
    """
    for name, option in GENERATION_OPTIONS.items():
        if name not in read and option.kind in ("count", "texts"):
            value = read_option(fields, option, dialect)
            if value is not None:
                read[name] = value
    return GenerationOptions(sampling=read_sampling(fields, dialect), **read)


def read_option(fields: Fields, option: Option, dialect: Dialect) -> Any:
    """The first of a dialect's fields for an option that is given; None where none is."""
    least, most = option.http_range
    for name in option.http.get(dialect, ()):
        match option.kind:
            case "number":
                value: Any = fields.number(name, least, most)
            case "count":
                value = fields.count(name, int(least), int(most))
            case "mapping":
                value = _token_numbers(fields, name, least, most)
            case _:
                value = fields.texts(name) or None
        if value is not None:
            return value
    return None


def read_sampling(fields: Fields, dialect: Dialect) -> Sampling:
    """How tokens are drawn."""
    found = {name: read_option(fields, option, dialect) for name, option in SAMPLING_OPTIONS.items()}
    given = {name: value for name, value in found.items() if value is not None}
    if given.get("temperature", 1) < GREEDY_BELOW:
        given["temperature"] = 0.0
    if given.get("top_k") == -1:  # how some clients write "all"
        given["top_k"] = 0
    if given.get("top_p") == 0:  # the likeliest token alone
        given["temperature"] = 0.0
        del given["top_p"]
    return Sampling(**given)


def _token_numbers(fields: Fields, name: str, least: float, most: float) -> dict[int, float] | None:
    """An object of token ids and numbers."""
    numbers = fields.object(name)
    if numbers is None:
        return None
    found = {}
    for token in numbers.values:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            fields.wrong(name, f"an object of token ids, and {token[:20]!r} is none")
        found[int(token)] = numbers.number(token, least, most) or 0.0
    return found


def read_thinking(fields: Fields) -> tuple[bool | None, int | None]:
    """(think or not or as the template says, tokens of thinking at most) of the switches that clients use."""
    think: bool | None = None
    budget: int | None = None
    effort = fields.choice("reasoning_effort", *EFFORTS)
    if effort is None and (reasoning := fields.object("reasoning")):
        effort = reasoning.choice("effort", *EFFORTS)
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
    choice = fields.values.get("tool_choice")
    if choice is None or isinstance(choice, str):
        return fields.choice("tool_choice", "auto", "none", "required") or "auto"
    named_choice = fields.object("tool_choice") or Fields({})
    if named_choice.text("type") != "function":
        named_choice.wrong("type", '"function": a choice of one function by its name')
    named = named_choice.object("function") or named_choice
    named.needed("name")
    return forced(str(named.text("name")))


def forced(name: str) -> dict[str, Any]:
    """The choice of one function."""
    return {"type": "function", "function": {"name": name}}
