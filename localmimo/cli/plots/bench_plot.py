"""Pictures of a bench: speed against depth, and where experts were found over time; as a file or as text.

Knows figures and steps; measures nothing. matplotlib is loaded when a file is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmimo.cli.plots.plot import save
from localmimo.cli.ui import bar

if TYPE_CHECKING:
    from localmimo.bench.runs import BenchRun, StepCost

SLICES = 12  # of the time, in text
COLOURS = {"gpu": "#2f6f4f", "ram": "#4f7fbf", "disk": "#d98b3a"}


def draw(path: Path, title: str, results: Sequence[dict[str, Any]], runs: Sequence[BenchRun]) -> None:
    """Write the picture."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "localmimo", "font.size": 9}):
        figure = Figure(figsize=(8, 6.5), layout="constrained")
        figure.suptitle(title, fontsize=9)
        speed, tiers = figure.subplots(2, 1)
        _draw_speed(speed, results)
        _draw_tiers(tiers, runs)
        save(figure, path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None, dpi=150)


def _draw_speed(axes: Any, results: Sequence[dict[str, Any]]) -> None:
    """Decode on the left axis, prefill on the right one."""
    for axis, name, colour in ((axes, "decode", "#4f7fbf"), (axes.twinx(), "prefill", "#d98b3a")):
        found = [result for result in results if result[f"{name}_tps"] is not None]
        axis.errorbar(
            [result["depth"] for result in found],
            [result[f"{name}_tps"] for result in found],
            yerr=[result[f"{name}_tps_sd"] or 0.0 for result in found],
            color=colour,
            marker="o",
            capsize=3,
        )
        axis.set_ylabel(f"{name}, tokens/s", color=colour)
        axis.set_ylim(bottom=0)
    axes.set_xlabel("depth of context, tokens")


def _draw_tiers(axes: Any, runs: Sequence[BenchRun]) -> None:
    """Shares of every step, stacked; a line where an answer begins."""
    steps = [step for run in runs for step in run.steps]
    shares = [_shares([step]) for step in steps]
    tiers = [tier for tier in COLOURS if any(tier in share for share in shares)]
    if steps:
        axes.stackplot(
            range(1, len(steps) + 1),
            [[share.get(tier, 0.0) for share in shares] for tier in tiers],
            labels=tiers,
            colors=[COLOURS[tier] for tier in tiers],
        )
        axes.legend(loc="lower left")
    begins = 0
    for run in runs:
        axes.axvline(begins + 0.5, color="black", linewidth=0.5, alpha=0.4)
        begins += len(run.steps)
    axes.set_xlim(0.5, max(1.5, len(steps) + 0.5))
    axes.set_ylim(0, 1)
    axes.set_xlabel("answered tokens, run after run")
    axes.set_ylabel("experts found in")


def _shares(steps: Sequence[StepCost]) -> dict[str, float]:
    from localmimo.bench.runs import tier_figures

    return dict(tier_figures(steps)["hits"])


def chart(results: Sequence[dict[str, Any]], runs: Sequence[BenchRun]) -> Iterator[str]:
    """The same in text."""
    yield " decode tok/s by depth"
    highest = max((result["decode_tps"] or 0.0 for result in results), default=0.0)
    for result in results:
        speed = result["decode_tps"] or 0.0
        yield f" {result['depth']:>9,}  {bar(speed / highest if highest else 0.0, 30)}  {speed:.1f}"
    yield " experts found in memory, as the answers went on"
    steps = [step for run in runs for step in run.steps]
    size = max(1, -(-len(steps) // SLICES))
    for start in range(0, len(steps), size):
        shares = _shares(steps[start : start + size])
        held = 1.0 - shares.get("disk", 0.0)
        stop = min(start + size, len(steps))
        span = str(stop) if stop == start + 1 else f"{start + 1}–{stop}"
        yield f" {span:>9}  {bar(held, 30)}  {held:.0%}"
