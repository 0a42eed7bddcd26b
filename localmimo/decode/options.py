"""The options of a generation, declared once: how tokens are drawn, and what an answer is asked to be.

The keywords of `Engine.stream`, the flags of `chat`, the names of /set, the fields of the HTTP dialects and the OpenAPI
document come from these two classes. Imports no torch: the command line shows them in its help. Must not know how an
option is carried out.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from threading import Event
from typing import TYPE_CHECKING, Any

from localmimo.chat.tool_choice import ToolChoice
from localmimo.decode.stopping import StopRules
from localmimo.errors import BadRequest
from localmimo.option import DIALECTS, check_names, check_options, option, options_of

if TYPE_CHECKING:
    from localmimo.decode.grammar import Grammar
    from localmimo.decode.session import Progress

MAX_LOGPROBS = 20  # log-probabilities of a token that an HTTP client may ask for


def _everywhere(name: str) -> dict[str, Any]:
    """The names of an option that is called the same in /set and in every dialect."""
    return {"set_names": (name.replace("_", "-"),), "http": dict.fromkeys(DIALECTS, (name,))}


# How clients ask for thinking, and for how much of it.
THINKING_FIELDS = ("reasoning_effort", "reasoning", "thinking", "chat_template_kwargs")
THINKING = {"http": dict.fromkeys(("chat", "responses", "messages"), THINKING_FIELDS)}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn. Temperature 0 takes the likeliest; a seed makes draws repeatable."""

    temperature: float = option(
        "number", 0.7, least=0, help="0 takes the likeliest token.", metavar="X",
        refusal="is negative; 0 takes the likeliest token",
        flags=("--temperature", "--temp"), set_names=("temperature", "temp"),
        http=dict.fromkeys(DIALECTS, ("temperature",)), http_range=(0, 100),
    )  # fmt: skip
    top_k: int = option(
        "count", 0, least=0, help="Tokens kept; 0 keeps all.", metavar="N",
        refusal="is negative; 0 keeps every token",
        flags=("--top-k",), **_everywhere("top_k"), http_range=(-1, 1 << 31),
    )  # fmt: skip
    top_p: float = option(
        "number", 0.95, least=0, above_least=True, most=1, help="Share of probability kept.", metavar="X",
        refusal="is not above 0 and at most 1",
        flags=("--top-p",), **_everywhere("top_p"), http_range=(0, 1),
    )  # fmt: skip
    min_p: float = option(
        "number", 0.0, least=0, most=1, help="Least share of the likeliest token's probability.", metavar="X",
        refusal="is not between 0 and 1",
        flags=("--min-p",), **_everywhere("min_p"), http_range=(0, 1),
    )  # fmt: skip
    repetition_penalty: float = option(
        "number", 1.0, least=0, above_least=True, metavar="X", refusal="is not above 0",
        help="Divides positive and multiplies negative logits of tokens seen before.",
        flags=("--repetition-penalty",), **_everywhere("repetition_penalty"), http_range=(0.01, 100),
    )  # fmt: skip
    presence_penalty: float = option(
        "number", 0.0, help="Taken off the logit of a token seen before.", metavar="X",
        flags=("--presence-penalty",), **_everywhere("presence_penalty"), http_range=(-2, 2),
    )  # fmt: skip
    frequency_penalty: float = option(
        "number", 0.0, help="Taken off a token's logit once for each time it was seen.", metavar="X",
        flags=("--frequency-penalty",), **_everywhere("frequency_penalty"), http_range=(-2, 2),
    )  # fmt: skip
    logit_bias: Mapping[int, float] = option(
        "mapping", {}, help="Token -> what is added to its logit.",
        http=dict.fromkeys(DIALECTS, ("logit_bias",)), http_range=(-100, 100),
    )  # fmt: skip
    bans: Sequence[int] = option("structure", (), help="Tokens that are never drawn.")
    seed: int | None = option(
        "count", help="Makes an answer repeatable.", metavar="N",
        flags=("--seed",), **_everywhere("seed"), http_range=(-(1 << 63), (1 << 63) - 1),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def counts_tokens(self) -> bool:
        """Whether a draw depends on the tokens before it."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def new_seed(self) -> int:
        """The seed, or a fresh random one."""
        return secrets.randbits(64) if self.seed is None else self.seed


def sampling_of(value: Sampling | Mapping[str, Any] | None) -> Sampling:
    """A Sampling, also from a mapping of its fields; None is the default. Raises BadRequest naming a wrong field."""
    if value is None or isinstance(value, Sampling):
        return value or Sampling()
    if not isinstance(value, Mapping):
        raise BadRequest(f"sampling is {value!r}; give a Sampling, or a mapping of its fields.")
    known = [field.name for field in fields(Sampling)]
    if unknown := [name for name in value if name not in known]:
        raise BadRequest(f"sampling has no {unknown[0]!r}; its fields are {', '.join(known)}.")
    try:
        return Sampling(**value)
    except TypeError as error:
        raise BadRequest(
            f"sampling is {dict(value)!r}, which has a value of a wrong type: {error}."
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """The keywords of `Engine.stream`, but for those that say what is continued and where."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = option(
        "count", least=1, help="Tokens of an answer, at most.", metavar="N",
        refusal="is too few; it must be at least 1",
        flags=("-n", "--max-tokens"), set_names=("max-tokens",), http_range=(1, (1 << 63) - 1),
        http={
            "chat": ("max_completion_tokens", "max_tokens"),  # the first that is given counts
            "completions": ("max_tokens",),
            "responses": ("max_output_tokens",),
            "messages": ("max_tokens",),
        },
    )  # fmt: skip
    stop: Sequence[str] = option(
        "texts", (), metavar="TEXT", flags=("--stop",),
        help="Text that ends the answer and is left out of it, thinking and calls aside; repeat for more.",
        http={"chat": ("stop",), "completions": ("stop",), "messages": ("stop_sequences",)},
    )  # fmt: skip
    think: bool | None = option(
        "switch", help="Think first.", default_help="as the model's template says",
        flags=("--think/--no-think",), **THINKING,
    )  # fmt: skip
    think_budget: int | None = option(
        "count", least=0, help="Tokens of thinking, at most; then it is closed and the answer begins.", metavar="N",
        flags=("--think-budget",), **THINKING,
    )  # fmt: skip
    tools: Sequence[Mapping[str, Any]] | None = option(
        "texts", help="Functions that the model may ask for; you are asked before each call.",
        metavar="FILE.py", flags=("--tools",),
        http=dict.fromkeys(("chat", "responses", "messages"), ("tools",)),
    )  # fmt: skip
    tool_choice: str | Mapping[str, Any] = option(
        "structure", "auto", help="Whether an answer must be a call, and of which function.",
        http=dict.fromkeys(("chat", "responses", "messages"), ("tool_choice",)),
    )  # fmt: skip
    parallel_tool_calls: bool = option(
        "switch", True, help="Whether an answer may make several calls.",
        http={
            "chat": ("parallel_tool_calls",),
            "responses": ("parallel_tool_calls",),
            "messages": ("tool_choice",),  # its disable_parallel_tool_use
        },
    )  # fmt: skip
    logprobs: int | None = option(
        "count", help="Log-probabilities of each token of the answer and of so many others.",
        http={"chat": ("logprobs", "top_logprobs"), "completions": ("logprobs",)},
        http_range=(0, MAX_LOGPROBS),
    )  # fmt: skip
    response_format: Mapping[str, Any] | None = option(
        "file", help="The answer is JSON that satisfies this schema.", metavar="FILE.json",
        flags=("--schema",), http={"chat": ("response_format",), "responses": ("text",)},
    )  # fmt: skip
    grammar: Grammar | str | None = option(
        "text", help="The answer follows this grammar (Lark or GBNF).", metavar="TEXT|@FILE",
        flags=("--grammar",),
    )  # fmt: skip
    cancel: Event = field(default_factory=Event)
    progress: Progress | None = None

    @property
    def rules(self) -> StopRules:
        one_call = self.choice.name is not None or not self.parallel_tool_calls
        return StopRules(self.max_tokens, tuple(self.stop), self.think_budget, self.logprobs, one_call)

    @property
    def callable(self) -> Sequence[Mapping[str, Any]] | None:
        """The tools that may be called. With the choice "none" they are in the prompt only, so that it stays."""
        return None if self.choice.mode == "none" else self.tools

    @property
    def choice(self) -> ToolChoice:
        """Raises BadRequest."""
        return ToolChoice.of(self.tool_choice, self.tools)


SAMPLING_OPTIONS = options_of(Sampling)
GENERATION_OPTIONS = options_of(GenerationOptions)
OPTIONS = SAMPLING_OPTIONS | GENERATION_OPTIONS
PLACES = ("tokens", "session")  # keywords of `stream` that say what is continued, and where


def check_keywords(given: Iterable[str], function: str) -> None:
    """Raises TypeError, with the right place or the nearest name, where `Engine.stream` has no such keyword."""
    given = list(given)
    drawn = [name for name in given if name in SAMPLING_OPTIONS]
    if drawn:
        raise TypeError(f"{drawn[0]} is an option of sampling: write sampling=Sampling({drawn[0]}=...).")
    check_names(given, (*GenerationOptions.__dataclass_fields__, *PLACES), function)
