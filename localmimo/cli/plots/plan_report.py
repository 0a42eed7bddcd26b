"""The report of a plan: for people, and for JSON.

Knows a plan's facts; nothing of how it was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from localmimo.cli.ui import rows, seconds
from localmimo.hardware.bandwidth import Speeds
from localmimo.hardware.units import format_bytes
from localmimo.planning.footprint import Footprint
from localmimo.planning.memory import (
    Plan,
    Vram,
)
from localmimo.planning.throughput import CACHE_BYTES, Estimate, Range, Tiers

WORDS_PER_TOKEN = 0.7


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan with everything that is shown about it."""

    model: Footprint
    plan: Plan
    tiers: Tiers
    speeds: Speeds
    estimate: Estimate
    vram_bytes: int
    n_cores: int
    better: tuple[str, ...]
    longest: int  # context that fits in this memory

    def as_dict(self) -> dict[str, Any]:
        model = self.model
        return {
            "model": model.name,
            "kind": model.kind,
            "codecs": model.codecs,
            "pack_bytes": model.pack_bytes,
            "source_bytes": model.source_bytes,
            "fits": True,
            "plan": self.plan.as_dict(),
            "vram_bytes": self.vram_bytes,
            "n_cores": self.n_cores,
            "gpu_slots": self.tiers.gpu_slots,
            "ram_slots": self.tiers.ram_slots,
            "disk_pages": self.tiers.disk_pages,
            "hit_rate_origin": self.tiers.origin,
            "speeds": self.speeds.as_dict(),
            "estimate": self.estimate.as_dict(),
            "better_if": list(self.better),
            "longest_context": self.longest,
            "notes": list(model.notes),
            "serve": model.member.serve_command() if model.member else None,
        }


def tps(speed: Range) -> str:
    low, high = (f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in speed)
    return f"{low} tok/s" if low == high else f"{low}–{high} tok/s"


def report_lines(
    answer: PlanReport, model_name: str, *, with_gpu: bool, measured_anew: bool
) -> Iterator[str]:
    """The report, line by line. model_name: as it was given; measured_anew: the speeds, for this report."""
    model, plan, tiers, figures = answer.model, answer.plan, answer.tiers, answer.estimate
    head = [model.name, model.codecs, f"{format_bytes(model.pack_bytes)} pack", f"context {plan.context:,}"]
    if model.source_bytes:
        head.insert(2, f"{format_bytes(model.source_bytes)} checkpoint")
    yield rows(head, 200, indent=1)
    yield _line("needed every token", _fixed(plan))
    yield _line(f"experts {format_bytes(model.experts_bytes)}", _places(answer))
    if plan.vram is not None and plan.vram.kv_slots:
        yield _line("as the context grows", _growth(plan, plan.vram))
    if answer.longest > plan.context:
        yield _line("longest context", f"{answer.longest:,}, with the fewest experts in memory")
    yield _line("read per token", _reads(answer))
    yield _line("hit rate", f"{_percent(figures.hits)} ({tiers.origin})")
    yield _line("speed", f"{_speed(figures)} on {answer.n_cores} cores")
    yield _line("bandwidth", _origin(answer.speeds))
    if answer.speeds.disk_cached:
        yield _line("", _cache(answer))
    if answer.better:
        yield _line("better if", "; ".join(answer.better))
    for note in model.notes:
        yield f" {note}"
    if with_gpu:
        yield from _gpu_notes(answer)
    check = f" Check it: localmimo bench {model_name} --check-plan" if model.kind == "pack" else ""
    measured = "measured" in (answer.speeds.disk_origin, answer.speeds.ram_origin) and not measured_anew
    again = " Measured speeds are kept for a week: --remeasure." if measured else ""
    yield f" Structure is exact; speed is an estimate.{again}{check}"
    if model.member and (command := model.member.serve_command()) and model.member.server:
        yield f" For many users on one server ({model.member.server.hardware}), the same checkpoint: {command}"


def _fixed(plan: Plan) -> str:
    """What is needed for every token, and the memory that it is in."""
    memory = plan.vram or plan
    sizes = {"dense": memory.dense_bytes, "KV": memory.kv_bytes, "workspace": memory.workspace_bytes}
    fixed = " + ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    return f"{fixed} → {'GPU' if plan.vram else 'RAM'}"


def _growth(plan: Plan, vram: Vram) -> str:
    """How many experts the KV displaces on a GPU."""
    grown = format_bytes(vram.kv_slots * vram.slot_bytes)
    return (
        f"GPU experts {plan.gpu_slots:,} at first, {plan.gpu_slots_at(plan.context):,} at {plan.context:,} tokens "
        f"(KV + {grown}); counted at half of it"
    )


def _line(name: str, text: str) -> str:
    return f" {name:<22} {text}"


def _places(answer: PlanReport) -> str:
    plan, tiers = answer.plan, answer.tiers
    parts = []
    for name, n_pages in (("GPU", tiers.gpu_slots), ("RAM", tiers.ram_slots), ("disk", tiers.disk_pages)):
        if n_pages:
            size = format_bytes(n_pages * plan.page_bytes)
            parts.append(f"{name} {size} {n_pages / plan.n_pages:.0%} ({n_pages:,} of {plan.n_pages:,})")
    return " · ".join(parts)


def _reads(answer: PlanReport) -> str:
    figures, model = answer.estimate, answer.model
    requested = format_bytes(model.config.pages_per_token * model.page_bytes)
    low, high = map(format_bytes, figures.disk_bytes)
    disk = "nothing from disk" if high == "0 kB" else f"from disk {low} to {high}" if low != high else low
    return f"{requested} of experts, {format_bytes(model.read_bytes)} of dense weights; {disk}"


def _percent(share: Range) -> str:
    low, high = (f"{100 * x:.0f}" for x in share)
    return f"{low} %" if low == high else f"{low}–{high} %"


def _speed(figures: Estimate) -> str:
    answer_s = [200 / WORDS_PER_TOKEN / tps for tps in reversed(figures.decode_tps)]
    return (
        f"{tps(figures.decode_tps)}, bound by {'the disk' if figures.bound == 'disk' else 'memory'} "
        f"(200 words: {seconds(answer_s[0])} to {seconds(answer_s[1])}) · prefill {tps(figures.prefill_tps)}"
    )


def _origin(speeds: Speeds) -> str:
    disk = f"disk {format_bytes(speeds.disk_read)}/s of pages four at a time"
    if speeds.disk_origin == "measured":
        disk += f", {format_bytes(speeds.disk_read_alone)}/s one at a time"
        disk += "" if speeds.direct else ", through the page cache"
    return f"{disk} ({speeds.disk_origin}) · RAM {format_bytes(speeds.ram_read)}/s ({speeds.ram_origin})"


def _cache(answer: PlanReport) -> str:
    """What a disk's second answer means for this pack."""
    again, share = format_bytes(answer.speeds.disk_again), min(1.0, CACHE_BYTES / answer.model.pack_bytes)
    taken = "which may hold all of this pack" if share == 1 else f"taken to hold {share:.0%} of this pack"
    return f"pages that were just read come again at {again}/s: a cache answers, {taken}"


def _gpu_notes(answer: PlanReport) -> Iterator[str]:
    yield (
        " Speeds with a GPU are not yet measured: they are arithmetic, with "
        f"{format_bytes(answer.speeds.gpu_read)}/s of GPU memory and {format_bytes(answer.speeds.pcie)}/s to it "
        "assumed."
    )
    if answer.plan.vram is None:
        yield " The GPU is too small for dense weights, KV and workspace, so nothing was placed on it."
