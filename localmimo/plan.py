"""Plan: dense weights + KV + workspace + expert slots against a budget, or the reason it does not fit.

Arithmetic only: knows shapes and bytes, loads no torch and opens no file.
"""

from dataclasses import asdict, dataclass
from typing import Any

from localmimo.config import LayerSpec, ModelConfig
from localmimo.errors import DoesNotFit
from localmimo.machine import format_bytes

PREFILL_CHUNK = (
    1024  # tokens that go through a layer at a time: fixed, so that a budget never changes an answer
)
LONGEST_STRETCH = (
    16_384  # tokens that go through the model layer by layer, so that each expert is read once for all
)
STRETCH_SHARE = 1 / 16  # of what is left of the budget: for the activations of longer stretches
N_SNAPSHOTS = 4  # points of a conversation that can be come back to
ATTENTION_WORKSPACE_BYTES = 8 << 20  # attention logits at a time
EXPERT_ROWS = 2048  # rows of a prompt that experts work on at a time (experts/run.py)
SCALE_BYTES = 4  # behind each int8 row of keys or values
LINEAR_WORKSPACE_BYTES = 8 << 20  # packed weights unpacked at a time
DEFAULT_CONTEXT = 32_768


@dataclass(frozen=True, slots=True)
class Plan:
    """How a RAM budget is spent."""

    context: int
    ram_bytes: int  # the budget
    dense_bytes: int
    kv_bytes: int  # of the whole context, its snapshots included
    workspace_bytes: int
    page_bytes: int
    n_pages: int  # experts of the model
    n_slots: int  # experts that fit
    stretch_tokens: int  # tokens of a prompt that go through each layer before the next layer begins
    n_drafts: int = 0  # draft heads in memory, among the dense bytes
    max_batch: int = 1  # timelines that may go on at the same time, each with a KV of its own

    @property
    def slots_bytes(self) -> int:
        return self.n_slots * self.page_bytes

    @property
    def used_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.slots_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"slots_bytes": self.slots_bytes, "used_bytes": self.used_bytes}

    def __str__(self) -> str:
        share = 100 * self.n_slots / self.n_pages
        parts = [
            f"RAM {format_bytes(self.used_bytes)} of {format_bytes(self.ram_bytes)}: "
            f"dense {format_bytes(self.dense_bytes)}",
            f"kv {format_bytes(self.kv_bytes)}",
            f"workspace {format_bytes(self.workspace_bytes)}",
            f"experts {format_bytes(self.slots_bytes)} ({self.n_slots:,} of {self.n_pages:,}, {share:.0f}%)",
        ]
        return " · ".join(parts)


def make_plan(
    config: ModelConfig,
    *,
    dense_bytes: int,
    page_bytes: int,
    context: int,
    ram_bytes: int,
    kv_item_bytes: int = 2,
    slack: int,
    n_drafts: int = 0,
    max_batch: int = 1,
) -> Plan:
    """Spend `ram_bytes`: what every token needs first, expert slots with the rest.

    dense_bytes: the draft heads that are used are counted in.

    Raises DoesNotFit where less than one token's experts would fit.
    """
    n_pages = config.n_experts * len(config.moe_layers)
    kv = max_batch * (
        kv_bytes(config, context, kv_item_bytes, slack) + draft_bytes(config, kv_item_bytes, slack, n_drafts)
    )
    least = dense_bytes + kv + workspace_bytes(config, context, PREFILL_CHUNK)
    spare = ram_bytes - least - config.pages_per_token * page_bytes
    if spare < 0:
        raise DoesNotFit(_too_small(config, least, dense_bytes, kv, page_bytes, context, ram_bytes))
    stretch = stretch_tokens(config, context, spare)
    workspace = workspace_bytes(config, context, stretch)
    slots = min(n_pages, (ram_bytes - dense_bytes - kv - workspace) // page_bytes) if n_pages else 0
    return Plan(
        context,
        ram_bytes,
        dense_bytes,
        kv,
        workspace,
        page_bytes,
        n_pages,
        slots,
        stretch,
        n_drafts,
        max_batch,
    )


def _too_small(
    config: ModelConfig, fixed: int, dense: int, kv: int, page_bytes: int, context: int, ram_bytes: int
) -> str:
    experts = config.pages_per_token * page_bytes
    return (
        f"This model needs {format_bytes(fixed + experts)} of RAM at the least and the budget is "
        f"{format_bytes(ram_bytes)}: dense weights {format_bytes(dense)}, "
        f"KV for {context:,} tokens {format_bytes(kv)}, workspace {format_bytes(fixed - dense - kv)}, "
        f"one token's {config.pages_per_token} experts {format_bytes(experts)}. "
        f"Give --ram {-(-(fixed + experts) // (1 << 20))}MiB or a shorter --context."
    )


def kv_bytes(config: ModelConfig, context: int, item_bytes: int, slack: int) -> int:
    """KV of `context` tokens: global layers whole, window layers as rings, and the snapshots of the rings."""
    total = 0
    for spec in config.layers:
        row = kv_row_bytes(spec, item_bytes)
        total += row * (context if spec.window is None else spec.window + slack + N_SNAPSHOTS * spec.window)
    return total


def kv_row_bytes(spec: LayerSpec, item_bytes: int) -> int:
    """Keys and values of one position of one layer."""
    scales = 2 * SCALE_BYTES if item_bytes == 1 else 0
    return spec.n_kv_heads * ((spec.head_dim + spec.v_head_dim) * item_bytes + scales)


def draft_bytes(config: ModelConfig, item_bytes: int, slack: int, n_drafts: int) -> int:
    """What a timeline keeps for its draft heads: a ring each, and hidden states in float32, the marks' too."""
    if not n_drafts:
        return 0
    spec = config.mtp_layer
    window = spec.window or 1
    ring = (window + slack) * kv_row_bytes(spec, item_bytes)
    return n_drafts * ring + 4 * config.hidden * (2 * (window + slack) + N_SNAPSHOTS * window)


def stretch_tokens(config: ModelConfig, context: int, spare_bytes: int) -> int:
    """One chunk, and as many more as a share of the spare bytes has room for: never more than the context needs."""
    more = int(spare_bytes * STRETCH_SHARE) // (4 * _stretch_floats(config) * PREFILL_CHUNK)
    most = min(-(-context // PREFILL_CHUNK), LONGEST_STRETCH // PREFILL_CHUNK)
    return min(1 + more, most) * PREFILL_CHUNK


def workspace_bytes(config: ModelConfig, context: int, stretch: int) -> int:
    """Upper estimate of what a stretch and one chunk of it need at a time, in float32, over the weights and the KV.

    A bf16 router is widened to float32 when it is loaded. Router statistics are counted here too.
    """
    n = min(PREFILL_CHUNK, context)
    layer = max(_attention_floats(config, spec, n) for spec in config.layers)
    experts = EXPERT_ROWS * (3 * config.hidden + 2 * config.expert_inner)
    chunk = 2 * n * config.hidden + max(layer, experts, 3 * n * config.dense_inner)
    floats = min(stretch, context) * _stretch_floats(config) + chunk + 4 * config.vocab_size
    widened = 2 * config.n_experts * config.hidden * len(config.moe_layers) if config.router_bf16 else 0
    fixed = 3 * ATTENTION_WORKSPACE_BYTES + 2 * LINEAR_WORKSPACE_BYTES + statistics_bytes(config)
    return 4 * floats + fixed + widened


def statistics_bytes(config: ModelConfig) -> int:
    """Router statistics and the policy's forecasts: two tables of what follows what, and 700 bytes a page."""
    return config.n_experts * len(config.moe_layers) * (2 * 4 * config.n_experts + 700)


def _stretch_floats(config: ModelConfig) -> int:
    """Per token of a stretch: residual, normed input (twice while pieces are joined), two sums; experts and weights."""
    return 5 * config.hidden + 8 * config.top_k


def _attention_floats(config: ModelConfig, spec: LayerSpec, n: int) -> int:
    """Queries, keys and values before and after rope, what attention gives, and a ring with the new rows behind."""
    ring = 0 if spec.window is None else (spec.window + n) * kv_row_bytes(spec, 4) // 4
    return n * (2 * sum(spec.qkv_rows) + spec.n_heads * spec.v_head_dim) + ring
