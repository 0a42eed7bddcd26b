"""Options: what one generation is asked to do, but for the prompt.

Facts only; knows nothing of how they are carried out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from localmimo.chat.tool_choice import ToolChoice
from localmimo.decode.grammar import Grammar
from localmimo.decode.sampler import Sampling
from localmimo.decode.session import Progress
from localmimo.decode.stopping import StopRules


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """The keywords of `Engine.stream`."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    think: bool | None = None
    think_budget: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    grammar: Grammar | str | None = None
    cancel: Event = field(default_factory=Event)
    progress: Progress | None = None

    @property
    def rules(self) -> StopRules:
        one_call = self.choice.name is not None or not self.parallel_tool_calls
        return StopRules(self.max_tokens, tuple(self.stop), self.think_budget, self.logprobs, one_call)

    @property
    def callable(self) -> Sequence[Mapping[str, Any]] | None:
        """The tools that may be called. With the choice "none" they stand in the prompt alone, so that it stays."""
        return None if self.choice.mode == "none" else self.tools

    @property
    def choice(self) -> ToolChoice:
        """Raises BadRequest."""
        return ToolChoice.of(self.tool_choice, self.tools)
