"""Estimate: how fast a plan should answer, as a range, from bytes, measured speeds and a hit rate.

Arithmetic only. A decode step moves, layer by layer: the dense weights and the KV (from memory), the experts found in
memory, and the missing ones (from disk, then from memory). Reads fly while resident experts are computed, but a layer's
reads start only when its router has spoken: the truth lies between full overlap and none, and those two are at most a
factor of two apart. Knows no files and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from localmimo.config import ModelConfig
from localmimo.plan import Plan, kv_row_bytes
from localmimo.speeds import N_READERS, Speeds
from localmimo.structure import Structure

Range = tuple[float, float]  # low, high

MEMORY_SHARE = (0.75, 1.0)  # of the read speed that the kernels reach (BENCHMARKS.md, CPU kernels)
LAYER_S = (0.0002, 0.0015)  # a layer's time beyond its bytes, where it was not measured
MATMUL_FLOPS = (30e9, 60e9)  # per core, of the kernels over many tokens (AVX-512, 4-bit weights)


@dataclass(frozen=True, slots=True)
class Tiers:
    """Where the experts lie: slots in each tier, and the share of requests that each answers (a range)."""

    gpu_slots: int
    ram_slots: int
    n_pages: int
    hits: Range  # of the requests that need no disk
    origin: str  # where the hit rate comes from

    @property
    def disk_pages(self) -> int:
        return max(0, self.n_pages - self.gpu_slots - self.ram_slots)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan should give. Ranges are (low, high)."""

    decode_tps: Range
    prefill_tps: Range
    disk_bytes: Range  # per decoded token
    hits: Range
    bound: str  # what takes the longest: disk or memory

    def as_dict(self) -> dict[str, Any]:
        return {
            "decode_tps": self.decode_tps,
            "prefill_tps": self.prefill_tps,
            "disk_bytes_per_token": self.disk_bytes,
            "hit_rate": self.hits,
            "bound": self.bound,
        }


def estimate(
    model: Structure, plan: Plan, speeds: Speeds, tiers: Tiers, *, n_cores: int, kv_item_bytes: int = 2
) -> Estimate:
    """Decode and prefill speed of a plan, at half its context. For a CPU alone leave tiers.gpu_slots at 0."""
    kv = kv_read_bytes(model.config, plan.context // 2, kv_item_bytes)
    slow, fast = (_step(model, speeds, tiers, hit, kv) for hit in tiers.hits)
    page_bytes = model.config.pages_per_token * model.page_bytes
    return Estimate(
        decode_tps=(1 / slow[1], 1 / fast[0]),
        prefill_tps=_prefill(model, plan, speeds, tiers, n_cores),
        disk_bytes=((1 - tiers.hits[1]) * page_bytes, (1 - tiers.hits[0]) * page_bytes),
        hits=tiers.hits,
        bound=slow[2],
    )


def decode_range(
    model: Structure, plan: Plan, speeds: Speeds, hit_rate: float, *, depth: int, kv_item_bytes: int = 2
) -> Range:
    """Predicted decode tokens per second on the CPU at one known hit rate, no wider than a factor of two.

    hit_rate: share of expert requests found in memory; depth: positions already in the context.
    """
    tiers = Tiers(0, plan.n_slots, plan.n_pages, (hit_rate, hit_rate), "measured")
    kv = kv_read_bytes(model.config, depth, kv_item_bytes)
    least, most, _ = _step(model, speeds, tiers, hit_rate, kv)
    return 1 / most, 1 / least


def _step(
    model: Structure, speeds: Speeds, tiers: Tiers, hit_rate: float, kv_bytes: int
) -> tuple[float, float, str]:
    """Least and most seconds of one decode step at a hit rate, and what bounds it."""
    config = model.config
    n_moe = len(config.moe_layers)
    asked = config.pages_per_token * model.page_bytes
    on_gpu = tiers.gpu_slots / max(1, tiers.gpu_slots + tiers.ram_slots) * hit_rate
    dense = model.read_bytes + kv_bytes
    if tiers.gpu_slots:
        gpu_s = (dense + on_gpu * asked) / speeds.gpu_read
        memory = (
            (1 - on_gpu) * asked * min(1.0, speeds.ram_read / speeds.pcie)
        )  # where it lies, or over the bus
        fixed = gpu_s
    else:
        memory = asked
        fixed = dense / speeds.ram_read
    misses = (1 - hit_rate) * config.top_k  # per layer
    disk_s = n_moe * misses * model.page_bytes / _disk_rate(speeds, misses)
    memory_s = memory / speeds.ram_read
    bound = "disk" if disk_s > fixed + memory_s else "memory"
    return (*_spread(fixed, memory_s, disk_s, _layer_s(speeds, len(config.layers))), bound)


def _spread(fixed: float, memory: float, disk: float, layers: Range) -> Range:
    """From full overlap at full speed to none at the least speed, and never more than a factor of two."""
    least = (fixed + max(memory, disk)) / MEMORY_SHARE[1] + layers[0]
    most = (fixed + memory) / MEMORY_SHARE[0] + disk + layers[1]
    if most <= 2 * least:
        return least, most
    middle = (least * most) ** 0.5
    return middle / 2**0.5, middle * 2**0.5


def _layer_s(speeds: Speeds, n_layers: int) -> Range:
    if speeds.layer_s is not None:
        return n_layers * speeds.layer_s * 0.8, n_layers * speeds.layer_s * 1.25
    return n_layers * LAYER_S[0], n_layers * LAYER_S[1]


def _disk_rate(speeds: Speeds, in_flight: float) -> float:
    """Between one read at a time and four, by how many misses a layer has."""
    share = min(1.0, max(0.0, (in_flight - 1) / (N_READERS - 1)))
    return speeds.disk_read_alone + share * (speeds.disk_read - speeds.disk_read_alone)


def kv_read_bytes(config: ModelConfig, depth: int, item_bytes: int) -> int:
    """Keys and values that a token at this depth reads."""
    total = 0
    for spec in config.layers:
        row = kv_row_bytes(spec, item_bytes)
        total += row * (depth if spec.window is None else min(depth, spec.window))
    return total


def _prefill(model: Structure, plan: Plan, speeds: Speeds, tiers: Tiers, n_cores: int) -> Range:
    """A stretch of prompt reads every expert it touches once and computes every token."""
    config, n = model.config, min(plan.stretch_tokens, plan.context)
    touched = 1 - (1 - config.top_k / config.n_experts) ** n
    away = tiers.disk_pages / max(1, tiers.n_pages)
    read_s = model.experts_bytes * touched * away / speeds.disk_read
    if tiers.gpu_slots:  # the GPU computes; the experts that it does not hold pass over the bus
        bus_s = model.experts_bytes * touched * (1 - tiers.gpu_slots / tiers.n_pages) / speeds.pcie
        gpu_s = (
            model.read_bytes + model.experts_bytes * touched
        ) / speeds.gpu_read  # its arithmetic is not counted
        return n / (read_s + bus_s + gpu_s), n / max(read_s, bus_s, gpu_s)
    flops = 2 * n * active_weights(model)
    fast = max(read_s, flops / (n_cores * MATMUL_FLOPS[1]))
    slow = read_s + flops / (n_cores * MATMUL_FLOPS[0])
    return n / slow, n / fast


def active_weights(model: Structure) -> int:
    """Weights that a token is multiplied with, embeddings excluded."""
    config = model.config
    total = config.vocab_size * config.hidden
    for spec in config.layers:
        total += config.hidden * (sum(spec.qkv_rows) + spec.n_heads * spec.v_head_dim)
        if spec.mlp == "dense":
            total += 3 * config.hidden * config.dense_inner
        else:
            total += config.hidden * (3 * config.top_k * config.expert_inner + config.n_experts)
    return total
