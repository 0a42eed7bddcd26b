"""Memory plan: dense weights + KV + workspace + expert slots against one budget or two, or the reason they do not fit.

Without a GPU all of it is RAM's. With one, VRAM has the dense weights, the windows' KV, the workspace of a prompt and
slots with the rest: for experts, which give way to the global layers' KV as the context grows. RAM has the embeddings,
a small workspace and slots for the other experts.

Arithmetic only: knows shapes and bytes, loads no torch and opens no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from localmimo.errors import DoesNotFit
from localmimo.hardware.units import format_bytes
from localmimo.kv.sizes import DeviceKv, device_kv, draft_bytes, kv_bytes, kv_row_bytes
from localmimo.limits import (
    ATTENTION_WORKSPACE_BYTES,
    DRIVER_BYTES,
    EXPERT_ROWS,
    LINEAR_WORKSPACE_BYTES,
    MAX_SEGMENT_TOKENS,
    PREFILL_CHUNK,
    SEGMENT_SHARE,
    SHARED_TOKENS,
    STAGES,
    UNPACKED_BYTES,
)
from localmimo.model.config import LayerSpec, ModelConfig


@dataclass(frozen=True, slots=True)
class Vram:
    """How a GPU's budget is spent."""

    budget_bytes: int
    dense_bytes: int
    kv_bytes: int  # of the window layers, their snapshots included
    workspace_bytes: int
    slots_bytes: int
    n_slots: int  # of a page each: for experts and for the global layers' KV
    kv_slots: int  # of them, that the KV has taken when every context is full; none at first
    slot_tokens: int  # positions that a slot has room for

    @property
    def used_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.slots_bytes

    @property
    def slot_bytes(self) -> int:
        return self.slots_bytes // self.n_slots if self.n_slots else 0

    def __str__(self) -> str:
        grown = self.kv_bytes + self.kv_slots * self.slot_bytes
        grows = f" growing to {format_bytes(grown)}" if self.kv_slots else ""
        return _said("VRAM", self.used_bytes, self.budget_bytes, [
            f"dense {format_bytes(self.dense_bytes)}",
            f"kv {format_bytes(self.kv_bytes)}{grows}",
            f"workspace {format_bytes(self.workspace_bytes)}",
        ])  # fmt: skip


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
        """Experts that fit on the GPU at first."""
        return self.gpu_slots_at(0)

    def gpu_slots_at(self, tokens: int) -> int:
        """Experts that fit on the GPU when every timeline holds so many tokens."""
        if self.vram is None:
            return 0
        taken = min(self.vram.kv_slots, self.max_batch * -(-tokens // max(1, self.vram.slot_tokens)))
        return min(self.n_pages, self.vram.n_slots - taken)

    @property
    def held_slots(self) -> int:
        """Experts that fit in memory of either kind at first."""
        return self.held_slots_at(0)

    def held_slots_at(self, tokens: int) -> int:
        """Experts that fit in memory of either kind when every timeline holds so many tokens."""
        return min(self.n_pages, self.n_slots + self.gpu_slots_at(tokens))

    @property
    def slots_bytes(self) -> int:
        return self.n_slots * self.page_bytes

    @property
    def used_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.slots_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"slots_bytes": self.slots_bytes, "used_bytes": self.used_bytes}

    def __str__(self) -> str:
        parts = [
            f"dense {format_bytes(self.dense_bytes)}",
            *([f"kv {format_bytes(self.kv_bytes)}"] if self.kv_bytes else []),
            f"workspace {format_bytes(self.workspace_bytes)}",
            self._experts(self.n_slots),
        ]
        ram = _said("RAM", self.used_bytes, self.ram_bytes, parts)
        return ram if self.vram is None else f"{self.vram} · {self._gpu_experts()} · {ram}"

    def _gpu_experts(self) -> str:
        first, full = self.gpu_slots, self.gpu_slots_at(self.context)
        after = f", then {full:,} at {self.context:,} tokens" if full < first else ""
        return self._experts(first) + after

    def _experts(self, n: int) -> str:
        share = 100 * n / self.n_pages
        return f"experts {format_bytes(n * self.page_bytes)} ({n:,} of {self.n_pages:,}, {share:.0f}%)"


def _said(name: str, used: int, budget: int, parts: Sequence[str]) -> str:
    """One budget for people."""
    return " · ".join([f"{name} {format_bytes(used)} of {format_bytes(budget)}: {parts[0]}", *parts[1:]])


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
    drafts = max_batch * draft_bytes(config, kv_item_bytes, slack, n_drafts)
    if vram_bytes is None:
        kv = max_batch * kv_bytes(config, context, kv_item_bytes, slack) + drafts
        return _in_ram(config, dense_bytes, kv, page_bytes, context, ram_bytes, n_drafts, max_batch)
    kv_there = device_kv(config, context, kv_item_bytes, slack, page_bytes, max_batch)
    kv_there = replace(kv_there, fixed_bytes=kv_there.fixed_bytes + drafts)
    vram, stretch = _on_gpu(config, dense_bytes - lookup_bytes, kv_there, page_bytes, context, vram_bytes)
    n_pages = config.n_experts * len(config.moe_layers)
    workspace = host_workspace_bytes(config)
    least = lookup_bytes + workspace
    if ram_bytes < least + config.pages_per_token * page_bytes:
        raise _too_small(config, least, lookup_bytes, 0, page_bytes, context, ram_bytes)
    least_there = min(n_pages, vram.n_slots - vram.kv_slots)
    wanted = max(n_pages - least_there, min(n_pages, config.pages_per_token))  # what comes is read into RAM
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
        raise _too_small(config, least, dense_bytes, kv, page_bytes, context, ram_bytes)
    stretch = stretch_tokens(config, context, spare)
    workspace = workspace_bytes(config, context, stretch)
    slots = min(n_pages, (ram_bytes - dense_bytes - kv - workspace) // page_bytes) if n_pages else 0
    return Plan(
        context, ram_bytes, dense_bytes, kv, workspace, page_bytes, n_pages, slots, stretch, n_drafts, max_batch
    )  # fmt: skip


def _on_gpu(
    config: ModelConfig,
    dense_bytes: int,
    kv: DeviceKv,
    page_bytes: int,
    context: int,
    vram_bytes: int,
) -> tuple[Vram, int]:
    """How VRAM is spent, and the tokens of a stretch of prompt."""
    grown = kv.fixed_bytes + kv.n_slots * page_bytes
    least = dense_bytes + grown + device_workspace_bytes(config, context, PREFILL_CHUNK, page_bytes)
    if vram_bytes < least:
        raise DoesNotFit(
            f"This model needs {format_bytes(least)} of VRAM at the least and the budget is "
            f"{format_bytes(vram_bytes)}: dense weights {format_bytes(dense_bytes)}, KV for {context:,} tokens "
            f"{format_bytes(grown)}, workspace {format_bytes(least - dense_bytes - grown)}. "
            f'Give vram={-(-least // (1 << 20))}MiB, a shorter context=, or device="cpu".',
            what="VRAM",
            needed_bytes=least,
            budget_bytes=vram_bytes,
        )
    stretch = stretch_tokens(config, context, vram_bytes - least)
    workspace = device_workspace_bytes(config, context, stretch, page_bytes)
    n_pages = config.n_experts * len(config.moe_layers)
    room = vram_bytes - dense_bytes - kv.fixed_bytes - workspace
    n_slots = min(n_pages + kv.n_slots, room // page_bytes)
    slots = n_slots * page_bytes, n_slots, kv.n_slots, kv.slot_tokens
    return Vram(vram_bytes, dense_bytes, kv.fixed_bytes, workspace, *slots), stretch


def _too_small(
    config: ModelConfig, fixed: int, dense: int, kv: int, page_bytes: int, context: int, ram_bytes: int
) -> DoesNotFit:
    experts = config.pages_per_token * page_bytes
    return DoesNotFit(
        f"This model needs {format_bytes(fixed + experts)} of RAM at the least and the budget is "
        f"{format_bytes(ram_bytes)}: dense weights {format_bytes(dense)}, "
        f"{f'KV for {context:,} tokens {format_bytes(kv)}, ' if kv else ''}"
        f"workspace {format_bytes(fixed - dense - kv)}, "
        f"one token's {config.pages_per_token} experts {format_bytes(experts)}. "
        f"Give ram={-(-(fixed + experts) // (1 << 20))}MiB{' or a shorter context=' if kv else ''}.",
        what="RAM",
        needed_bytes=fixed + experts,
        budget_bytes=ram_bytes,
    )


def stretch_tokens(config: ModelConfig, context: int, spare_bytes: int) -> int:
    """One chunk, and as many more as a share of the spare bytes has room for: never more than the context needs."""
    more = int(spare_bytes * SEGMENT_SHARE) // (4 * _stretch_floats(config) * PREFILL_CHUNK)
    most = min(-(-context // PREFILL_CHUNK), MAX_SEGMENT_TOKENS // PREFILL_CHUNK)
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
    """Router statistics and the policy's forecasts: 700 bytes a page."""
    return 700 * config.n_experts * len(config.moe_layers)


def _stretch_floats(config: ModelConfig) -> int:
    """Per token of a stretch: residual, normed input (twice while pieces are joined), two sums; experts and weights."""
    return 5 * config.hidden + 8 * config.top_k


def _attention_floats(config: ModelConfig, spec: LayerSpec, n: int) -> int:
    """Queries, keys and values before and after rope, what attention gives, and a ring with the new rows behind."""
    ring = 0 if spec.window is None else (spec.window + n) * kv_row_bytes(spec, 4) // 4
    return n * (2 * sum(spec.qkv_rows) + spec.n_heads * spec.v_head_dim) + ring
