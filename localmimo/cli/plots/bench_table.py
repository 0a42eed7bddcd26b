"""The table of a measurement: its head, a row per depth, the status line, and the check of the plan.

Knows figures and widths; nothing of how they are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from localmimo.cli.ui import rows, seconds
from localmimo.hardware.units import format_bytes

if TYPE_CHECKING:
    from localmimo.bench.runs import BenchRun

# Heads and widths of the table; every row is printed as soon as its depth is done.
COLUMNS = (
    ("depth", 7), ("prefill tok/s", 15), ("decode tok/s", 13), ("first token", 11), ("read/token", 10),
    ("disk GB/s", 9), ("drafts", 6), ("experts found in", 16),
)  # fmt: skip


def plan_line(depth: int, check: dict[str, Any]) -> str:
    """Predicted and measured, for people."""
    low, high = map(_speed, check["predicted_tps"])
    verdict = "inside" if check["inside"] else "outside"
    return (
        f" plan at depth {depth:,}: {low} to {high} tok/s at a hit rate of {check['hit_rate']:.0%}; "
        f"measured {_speed(check['measured_tps'])}: {verdict}"
    )


def head(form: str) -> str:
    if form == "md":
        return _markdown([name for name, _ in COLUMNS]) + "\n" + "|---" * len(COLUMNS) + "|"
    return "\n" + _aligned([name for name, _ in COLUMNS])


def row(found: dict[str, Any], form: str) -> str:
    """The figures of a depth."""
    decode = found["decode"]
    cells = [
        f"{found['depth']:,}",
        _with_spread(found, "prefill_tps"),
        _with_spread(found, "decode_tps"),
        seconds(found["first_token_s"]),
        "–" if decode["disk_bytes_per_token"] is None else format_bytes(decode["disk_bytes_per_token"]),
        "–" if decode["disk_read"] is None else f"{decode['disk_read'] / 1e9:.2f}",
        "–" if found["drafts"]["acceptance"] is None else f"{found['drafts']['acceptance']:.0%}",
        found_in(decode["hits"]),
    ]
    return _markdown(cells) if form == "md" else _aligned(cells)


def found_in(shares: dict[str, float]) -> str:
    """ram 79% disk 21%."""
    return " ".join(f"{tier} {share:.0%}" for tier, share in shares.items()) or "–"


def _with_spread(found: dict[str, Any], name: str) -> str:
    mean, sd = found[name], found[f"{name}_sd"]
    if mean is None:
        return "–"
    return _speed(mean) if sd is None else f"{_speed(mean)} ± {_speed(sd)}"


def _speed(tps: float) -> str:
    return f"{tps:.0f}" if tps >= 100 else f"{tps:.1f}" if tps >= 1 else f"{tps:.2f}"


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _aligned(cells: Sequence[str]) -> str:
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)).rstrip()


def live_line(run: BenchRun, n_runs: int, max_tokens: int) -> str:
    """Which of so many runs and tokens is being measured, and what the tiers gave in this answer so far."""
    from localmimo.bench.runs import tier_figures

    so_far = tier_figures(run.steps)
    speed = len(run.steps) / sum(step.seconds for step in run.steps)
    parts = [
        f" depth {run.depth:,}",
        f"run {run.number + 1}/{n_runs}",
        f"token {len(run.steps) + 1}/{max_tokens}",
        f"{_speed(speed)} tok/s",
        f"experts {found_in(so_far['hits'])}",
    ]
    if so_far["disk_read"]:
        parts.append(f"disk {so_far['disk_read'] / 1e9:.2f} GB/s")
    return rows(parts, 1000, indent=0)
