"""Plan: dense weights + KV + workspace + expert slots against one budget or two, or the reason they do not fit.

Without a GPU all of it is RAM's. With one, VRAM has the dense weights, the KV, the workspace of a prompt and expert
slots with the rest; RAM has the embeddings, a small workspace and slots for the other experts.

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
SHARED_TOKENS = (
    256  # of a prompt, up to which experts are shared between GPU and CPU; beyond, all pages go to the GPU
)
STAGES = 4  # pages on their way through the GPU (experts/conveyor.py)
DRIVER_BYTES = 1 << 30  # of a GPU's memory, for its libraries and for what the allocator cannot use
UNPACKED_BYTES = 2 << 26  # of one matrix at a time, in bfloat16, and its product (quant/gpu)
EXPERT_ROWS = 2048  # rows of a prompt that experts work on at a time (experts/run.py)
SCALE_BYTES = 4  # behind each int8 row of keys or values
LINEAR_WORKSPACE_BYTES = 8 << 20  # packed weights unpacked at a time
DEFAULT_CONTEXT = 32_768


@dataclass(frozen=True, slots=True)
class Vram:
    """How a GPU's budget is spent."""

    budget_bytes: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    slots_bytes: int
    n_slots: int

    @property
    def used_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.slots_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """How a RAM budget is spent, and a GPU's, where there is one."""

    context: int
    ram_bytes: int  # the budget
    dense_bytes: int  # in RAM
    kv_bytes: int  # in RAM: of the whole context, its snapshots included
    workspace_bytes: int
    page_bytes: int
    n_pages: int  # experts of the model
    n_slots: int  # experts that fit in RAM
    stretch_tokens: int  # tokens of a prompt that go through each layer before the next layer begins
    n_drafts: int = 0  # draft heads in memory, among the dense bytes
    max_batch: int = 1  # timelines that may go on at the same time, each with a KV of its own
    vram: Vram | None = None

    @property
    def gpu_slots(self) -> int:
        """Experts that fit on the GPU."""
        return 0 if self.vram is None else self.vram.n_slots

    @property
    def held_slots(self) -> int:
        """Experts that fit in memory of either kind."""
        return min(self.n_pages, self.n_slots + self.gpu_slots)

    @property
    def slots_bytes(self) -> int:
        return self.n_slots * self.page_bytes

    @property
    def used_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.slots_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"slots_bytes": self.slots_bytes, "used_bytes": self.used_bytes}

    def __str__(self) -> str:
        ram = _spent("RAM", self.used_bytes, self.ram_bytes, self, self.n_pages)
        if self.vram is None:
            return ram
        return (
            f"{_spent('VRAM', self.vram.used_bytes, self.vram.budget_bytes, self.vram, self.n_pages)} · {ram}"
        )


def _spent(name: str, used: int, budget: int, part: Plan | Vram, n_pages: int) -> str:
    """One budget for people."""
    parts = [
        f"{name} {format_bytes(used)} of {format_bytes(budget)}: dense {format_bytes(part.dense_bytes)}",
        *([f"kv {format_bytes(part.kv_bytes)}"] if part.kv_bytes else []),
        f"workspace {format_bytes(part.workspace_bytes)}",
        f"experts {format_bytes(part.slots_bytes)} ({part.n_slots:,} of {n_pages:,}, "
        f"{100 * part.n_slots / n_pages:.0f}%)",
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
    vram_bytes: int | None = None,
    lookup_bytes: int = 0,
) -> Plan:
    """Spend `ram_bytes`, and `vram_bytes` where there is a GPU: what every token needs first, slots with the rest.

    dense_bytes: the draft heads that are used are counted in. lookup_bytes: of them, embeddings.

    Raises DoesNotFit where less than one token's experts would fit.
    """
    kv = max_batch * (
        kv_bytes(config, context, kv_item_bytes, slack) + draft_bytes(config, kv_item_bytes, slack, n_drafts)
    )
    if vram_bytes is None:
        return _in_ram(config, dense_bytes, kv, page_bytes, context, ram_bytes, n_drafts, max_batch)
    vram, stretch = _on_gpu(config, dense_bytes - lookup_bytes, kv, page_bytes, context, vram_bytes)
    n_pages = config.n_experts * len(config.moe_layers)
    workspace = host_workspace_bytes(config)
    least = lookup_bytes + workspace
    if ram_bytes < least + config.pages_per_token * page_bytes:
        raise DoesNotFit(_too_small(config, least, lookup_bytes, 0, page_bytes, context, ram_bytes))
    wanted = max(
        n_pages - vram.n_slots, min(n_pages, config.pages_per_token)
    )  # what comes is read into a slot of RAM
    slots = min(wanted, (ram_bytes - least) // page_bytes)
    return Plan(
        context, ram_bytes, lookup_bytes, 0, workspace, page_bytes, n_pages, slots, stretch, n_drafts, max_batch, vram
    )  # fmt: skip


def _in_ram(
    config: ModelConfig,
    dense_bytes: int,
    kv: int,
    page_bytes: int,
    context: int,
    ram_bytes: int,
    n_drafts: int,
    max_batch: int,
) -> Plan:
    n_pages = config.n_experts * len(config.moe_layers)
    least = dense_bytes + kv + workspace_bytes(config, context, PREFILL_CHUNK)
    spare = ram_bytes - least - config.pages_per_token * page_bytes
    if spare < 0:
        raise DoesNotFit(_too_small(config, least, dense_bytes, kv, page_bytes, context, ram_bytes))
    stretch = stretch_tokens(config, context, spare)
    workspace = workspace_bytes(config, context, stretch)
    slots = min(n_pages, (ram_bytes - dense_bytes - kv - workspace) // page_bytes) if n_pages else 0
    return Plan(
        context, ram_bytes, dense_bytes, kv, workspace, page_bytes, n_pages, slots, stretch, n_drafts, max_batch
    )  # fmt: skip


def _on_gpu(
    config: ModelConfig, dense_bytes: int, kv: int, page_bytes: int, context: int, vram_bytes: int
) -> tuple[Vram, int]:
    """How VRAM is spent, and the tokens of a stretch of prompt."""
    least = dense_bytes + kv + device_workspace_bytes(config, context, PREFILL_CHUNK, page_bytes)
    if vram_bytes < least:
        raise DoesNotFit(
            f"This model needs {format_bytes(least)} of VRAM at the least and the budget is "
            f"{format_bytes(vram_bytes)}: dense weights {format_bytes(dense_bytes)}, KV for {context:,} tokens "
            f"{format_bytes(kv)}, workspace {format_bytes(least - dense_bytes - kv)}. "
            f"Give --vram {-(-least // (1 << 20))}MiB, a shorter --context, or --device cpu."
        )
    stretch = stretch_tokens(config, context, vram_bytes - least)
    workspace = device_workspace_bytes(config, context, stretch, page_bytes)
    n_pages = config.n_experts * len(config.moe_layers)
    n_slots = min(n_pages, (vram_bytes - dense_bytes - kv - workspace) // page_bytes)
    return Vram(vram_bytes, dense_bytes, kv, workspace, n_slots * page_bytes, n_slots), stretch


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


def device_workspace_bytes(config: ModelConfig, context: int, stretch: int, page_bytes: int) -> int:
    """What the GPU needs over weights, KV and slots: as much as RAM would, pages on their way, and its libraries."""
    prompt = workspace_bytes(config, context, stretch) - statistics_bytes(config)
    shared = 3 * 4 * SHARED_TOKENS * config.top_k * (config.hidden + config.expert_inner)
    return prompt + shared + STAGES * page_bytes + UNPACKED_BYTES + DRIVER_BYTES


def host_workspace_bytes(config: ModelConfig) -> int:
    """What RAM needs beside a GPU: statistics, and the experts of short prompts that are computed here."""
    rows = SHARED_TOKENS * (config.top_k * (config.hidden + 2 * config.expert_inner) + 3 * config.hidden)
    return statistics_bytes(config) + 2 * 4 * rows + 2 * LINEAR_WORKSPACE_BYTES + 4 * config.vocab_size


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
