"""Steps: the pieces of an answer, and the figures of the generation that gives them.

Facts only. Must not know sessions, models or how an answer is shown.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from localmimo.chat.partial_call import PartialCall
from localmimo.chat.stream_parser import Kind
from localmimo.chat.tool_call import ToolCall
from localmimo.experts.store.counters import hit_shares
from localmimo.limits import MAX_DRAFTS, TIERS

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "context"]


@dataclass(slots=True)
class DraftStats:
    """What drafting took and gave."""

    passes: int = 0  # of the main model, after the prompt
    drafted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)  # tokens, by head
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)
    pages: list[int] = field(
        default_factory=lambda: [0] * (MAX_DRAFTS + 1)
    )  # asked for, by depth of the pass
    passes_at: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFTS + 1))

    @property
    def acceptance(self) -> list[float]:
        """Share of each head's drafts that were drawn."""
        return [a / n if n else 0.0 for a, n in zip(self.accepted, self.drafted, strict=True)]

    @property
    def expert_growth(self) -> list[float]:
        """Experts that a pass asks for, by its depth, over those of a pass without drafts; 0 where not known."""
        per_pass = [p / n if n else 0.0 for p, n in zip(self.pages, self.passes_at, strict=True)]
        return [pages / per_pass[0] if per_pass[0] else 0.0 for pages in per_pass]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"acceptance": self.acceptance, "expert_growth": self.expert_growth}


@dataclass(slots=True)
class Stats:
    """What one generation took so far; seconds are wall time, tokens are counts."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, already in the KV cache
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    pages_gpu: int = 0  # expert pages found on the GPU
    pages_ram: int = 0  # expert pages found in RAM
    pages_disk: int = 0  # expert pages read from disk
    bytes_read: int = 0
    read_s: float = 0.0  # time in which the disk was being read
    prefetch_useful: int = 0  # prefetched pages that were then needed
    prefetch_wasted: int = 0  # prefetched pages that were not needed
    drafts: DraftStats = field(default_factory=DraftStats)

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens read per second; 0 where nothing had to be read."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first; 0 before there are two."""
        return (
            (self.generated_tokens - 1) / self.decode_s
            if self.generated_tokens > 1 and self.decode_s
            else 0.0
        )

    @property
    def pages(self) -> dict[str, int]:
        """Expert pages by the tier they were found in."""
        return {tier: getattr(self, f"pages_{tier}") for tier in TIERS}

    @property
    def hits(self) -> dict[str, float]:
        """Share of expert pages by the tier they were found in."""
        return hit_shares(self.pages)

    def as_dict(self) -> dict[str, Any]:
        derived = {"prefill_tps": self.prefill_tps, "decode_tps": self.decode_tps, "hits": self.hits}
        derived["drafts"] = self.drafts.as_dict()
        return asdict(self) | derived


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of the answer. `finish_reason` is set on the last step alone, whose text is empty.

    `token` is the token that gave the text; where one token gives several steps, the first of them has it.
    """

    text: str
    token: int | None
    kind: Kind
    stats: Stats
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    tool_call: ToolCall | None = None  # complete
    call_part: PartialCall | None = None  # of a call that is being written, or was completed with this step
    finish_reason: FinishReason | None = None
