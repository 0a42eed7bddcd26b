"""Throughput: how fast a plan should answer, as a range, from bytes, measured speeds and a hit rate.

Arithmetic only. A decode step computes with the dense weights, the KV and its experts, and reads the missing ones. A
layer's reads start when its router has spoken, or earlier where it was guessed: they go on beside the computing of all
that is there, or of nothing. So a step takes from the longer of the two, at full speed, to the sum of both, at the
slow end of every speed; where these ends are more than a factor of two apart, what is given is the factor of two around
their geometric mean. Knows no files and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from localmimo.hardware.bandwidth import Speeds
from localmimo.kv.sizes import kv_row_bytes
from localmimo.limits import N_READERS
from localmimo.model.config import ModelConfig
from localmimo.planning.footprint import Footprint
from localmimo.planning.memory import Plan

Range = tuple[float, float]  # low, high

MEMORY_SHARE = (0.6, 1.0)  # of the read speed that the kernels reach (docs/lab-notes.md, CPU kernels)
PRODUCTS_SHARE = (0.6, 1.0)  # of the kernels' measured speed, in a step that does much else between products
LAYER_S = (0.0002, 0.0015)  # a layer's time beyond its bytes, where it was not measured
LAYER_SHARE = (0.8, 2.0)  # of the measured one: of a model with few and small experts
# Where not every page can stay: a forecast of which do, and how many a token makes if no layer, or each, misses one.
FORECAST_S, FORECASTS = (0.0005, 0.0015), (1, 5)  # docs/lab-notes.md, Paging
WASTED = 1.25  # bytes read over bytes needed, where guesses err (docs/lab-notes.md, Paging)
CACHE_BYTES = 16e9  # a pack up to here may lie in a cache that answers a second read
WIDEST = 2.0  # the slow end over the fast one, at a known hit rate
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
    model: Footprint, plan: Plan, speeds: Speeds, tiers: Tiers, *, n_cores: int, kv_item_bytes: int = 2
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
    model: Footprint,
    plan: Plan,
    speeds: Sequence[Speeds],
    hit_rate: float,
    *,
    depth: int,
    kv_item_bytes: int = 2,
) -> Range:
    """Predicted decode tokens per second on the CPU at one known hit rate, no wider than a factor of two.

    speeds: the machine's, perhaps measured several times. hit_rate: share of expert requests found in memory. depth:
    positions already in the context.
    """
    tiers = Tiers(0, plan.n_slots, plan.n_pages, (hit_rate, hit_rate), "measured")
    kv = kv_read_bytes(model.config, depth, kv_item_bytes)
    steps = [_parts(model, found, tiers, hit_rate, kv).ends for found in speeds]
    least, most = _narrowed(min(ends[0] for ends in steps), max(ends[1] for ends in steps))
    return 1 / most, 1 / least


@dataclass(frozen=True, slots=True)
class _Parts:
    """Seconds of a step that the processor takes, and that the disk takes."""

    compute: Range
    disk: Range

    @property
    def ends(self) -> Range:
        return max(self.compute[0], self.disk[0]), self.compute[1] + self.disk[1]

    @property
    def bound(self) -> str:
        return "disk" if sum(self.disk) > sum(self.compute) else "memory"


def _narrowed(least: float, most: float) -> Range:
    if most <= WIDEST * least:
        return least, most
    middle = (least * most) ** 0.5
    return middle / WIDEST**0.5, middle * WIDEST**0.5


def _step(
    model: Footprint, speeds: Speeds, tiers: Tiers, hit_rate: float, kv_bytes: int
) -> tuple[float, float, str]:
    """Least and most seconds of one decode step at a hit rate, and what bounds it."""
    parts = _parts(model, speeds, tiers, hit_rate, kv_bytes)
    return (*_narrowed(*parts.ends), parts.bound)


def _parts(model: Footprint, speeds: Speeds, tiers: Tiers, hit_rate: float, kv_bytes: int) -> _Parts:
    config = model.config
    asked = config.pages_per_token * model.page_bytes
    dense = model.read_bytes + kv_bytes
    on_gpu = tiers.gpu_slots / max(1, tiers.gpu_slots + tiers.ram_slots) * hit_rate
    layers = _layer_s(speeds, len(config.layers))
    if tiers.gpu_slots:
        gpu_s = (dense + on_gpu * asked) / speeds.gpu_read
        rest = (1 - on_gpu) * asked  # where it lies, or over the bus
        compute = _compute_s(speeds, rest, min(1.0, speeds.ram_read / speeds.pcie))
        compute = compute[0] + gpu_s, compute[1] + gpu_s / MEMORY_SHARE[0]
    else:
        compute = _compute_s(speeds, dense + asked)
    misses = (1 - hit_rate) * config.top_k  # per layer
    n_bytes = len(config.moe_layers) * misses * model.page_bytes
    slow, fast = disk_rates(speeds, misses, model.pack_bytes)
    disk = n_bytes / fast, WASTED * n_bytes / slow
    deciding = _deciding_s(tiers, misses)
    return _Parts((compute[0] + layers[0] + deciding[0], compute[1] + layers[1] + deciding[1]), disk)


def _compute_s(speeds: Speeds, n_bytes: float, share: float = 1.0) -> Range:
    """Seconds for products with weights of so many bytes; at best only this share of them."""
    speed, (slow, fast) = speeds.ram_read, MEMORY_SHARE
    if speeds.products is not None:
        speed, (slow, fast) = speeds.products, PRODUCTS_SHARE
    return share * n_bytes / speed / fast, n_bytes / speed / slow


def _layer_s(speeds: Speeds, n_layers: int) -> Range:
    if speeds.layer_s is None:
        return n_layers * LAYER_S[0], n_layers * LAYER_S[1]
    return n_layers * speeds.layer_s * LAYER_SHARE[0], n_layers * speeds.layer_s * LAYER_SHARE[1]


def _deciding_s(tiers: Tiers, misses: float) -> Range:
    """A step's forecasts of which pages should stay, at so many misses a layer."""
    if not tiers.disk_pages:
        return 0.0, 0.0
    n = FORECASTS[0] + min(1.0, misses) * (FORECASTS[1] - FORECASTS[0])
    return n * FORECAST_S[0], n * FORECAST_S[1]


def disk_rates(speeds: Speeds, in_flight: float, pack_bytes: int) -> Range:
    """Slow and fast bytes per second of a disk that has so many reads per layer.

    Between one read at a time and four. A cache that answers what was read before answers a pack that fits into it;
    the slow end is then half way there.
    """
    share = min(1.0, max(0.0, (in_flight - 1) / (N_READERS - 1)))
    rate = speeds.disk_read_alone + share * (speeds.disk_read - speeds.disk_read_alone)
    again = 1 + (speeds.gain_again - 1) * min(1.0, CACHE_BYTES / pack_bytes)
    return rate * again**0.5, max(rate, speeds.disk_read) * again


def kv_read_bytes(config: ModelConfig, depth: int, item_bytes: int) -> int:
    """Keys and values that a token at this depth reads."""
    total = 0
    for spec in config.layers:
        row = kv_row_bytes(spec, item_bytes)
        total += row * (depth if spec.window is None else min(depth, spec.window))
    return total


def _prefill(model: Footprint, plan: Plan, speeds: Speeds, tiers: Tiers, n_cores: int) -> Range:
    """A stretch of prompt reads every expert it touches once and computes every token."""
    config, n = model.config, min(plan.stretch_tokens, plan.context)
    touched = 1 - (1 - config.top_k / config.n_experts) ** n
    away = tiers.disk_pages / max(1, tiers.n_pages)
    read_s = model.experts_bytes * touched * away / speeds.disk_read
    if tiers.gpu_slots:  # the GPU computes; the experts that it does not hold pass over the bus
        bus_s = model.experts_bytes * touched * (1 - tiers.gpu_slots / tiers.n_pages) / speeds.pcie
        gpu_s = (model.read_bytes + model.experts_bytes * touched) / speeds.gpu_read  # without its arithmetic
        return n / (read_s + bus_s + gpu_s), n / max(read_s, bus_s, gpu_s)
    flops = 2 * n * active_weights(model)
    fast = max(read_s, flops / (n_cores * MATMUL_FLOPS[1]))
    slow = read_s + flops / (n_cores * MATMUL_FLOPS[0])
    return n / slow, n / fast


def active_weights(model: Footprint) -> int:
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
