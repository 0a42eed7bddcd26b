"""Options: what one generation is asked to do, but for the prompt.

Facts only; knows nothing of how they are carried out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from localmimo.generate import Rules
from localmimo.grammar import Grammar
from localmimo.sample import Sampling
from localmimo.session import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The keywords of `Engine.stream`."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    think: bool | None = None
    think_budget: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    grammar: Grammar | str | None = None
    cancel: Event = field(default_factory=Event)
    progress: Progress | None = None

    @property
    def rules(self) -> Rules:
        return Rules(self.max_tokens, tuple(self.stop), self.think_budget, self.logprobs)
