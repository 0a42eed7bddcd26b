"""`localmimo replay`: hit rates of the policies over a router trace, as a table, JSON or a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmimo.cli.options import Json, Plot, Quiet, Verbose, run_interruptible, ui_of
from localmimo.cli.plots.plot import check_plot, draw_lines, picture
from localmimo.cli.ui import Ui, parse_count, table
from localmimo.errors import BadRequest

if TYPE_CHECKING:
    from localmimo.experts.policy.replay import Replayed

MAX_SLOTS = 1 << 22


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A router trace: JSON lines.")],
    slots: Annotated[
        str, typer.Option("--slots", metavar="N[,N...]", help="Numbers of slots to play it with.")
    ],
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Play a router trace through our policy, LRU, LFU and the best that is possible (Belady).

    A line of a trace is {"step": 0, "layer": 1, "experts": [3, 17]}: one per token and layer, in order. With
    --json the last line of stdout is a list: slots, requests and the hit rate of each policy.
    """
    return run_interruptible(lambda: run_replay(trace, slots, plot, ui_of(verbose, quiet), as_json=as_json))


def run_replay(trace: Path, slots: str, plot: Path | None, ui: Ui, *, as_json: bool) -> int:
    """Run the command; the exit code."""
    sizes = parse_slots(slots)
    check_plot(plot)
    path = trace.expanduser()
    if not path.is_file():
        raise BadRequest(f"There is no file {path}.")
    results = _replays(path, sizes, ui)
    if plot is not None:
        picture(plot, lambda: draw_lines(plot, sizes, _curves(results), ("slots", "hit rate, %")), ui)
    if as_json:
        ui.json([asdict(result) for result in results])
    else:
        ui.data(report(results))
    return 0


def parse_slots(text: str) -> list[int]:
    """1024,2k -> [1024, 2048], ascending. Raises BadRequest."""
    sizes = sorted({parse_count(part, "--slots") for part in text.split(",")})
    if not 0 < sizes[0] <= sizes[-1] <= MAX_SLOTS:
        raise BadRequest(f'--slots is "{text}"; give numbers from 1 to {MAX_SLOTS:,}, such as 64,128.')
    return sizes


def _replays(path: Path, sizes: Sequence[int], ui: Ui) -> list[Replayed]:
    from localmimo.experts.policy.replay import replay
    from localmimo.experts.policy.trace import read_trace

    ui.status.show(f" reading {path} ...", now=True)
    trace = read_trace(path)
    ui.note(
        f" {trace.n_steps:,} tokens, {len(set(trace.layers))} layers, {trace.n_requests:,} requests: "
        f"{trace.n_requests / trace.n_steps:,.1f} pages a token"
    )
    results = []
    for n in sizes:
        ui.status.show(f" playing with {n:,} slots ...", now=True)
        results.append(replay(trace, n))
    ui.status.clear()
    return results


def _curves(results: Sequence[Replayed]) -> dict[str, list[float]]:
    names = {"Belady (knows the future)": "belady", "ours": "ours", "LRU": "lru", "LFU": "lfu"}
    return {name: [100 * getattr(result, key) for result in results] for name, key in names.items()}


def report(results: Sequence[Replayed]) -> str:
    """Hit rates in per cent, and how much of the way from LRU to Belady ours goes."""
    lines = [
        [f"{result.slots:,}", *(f"{100 * rate:.1f} %" for rate in (result.lru, result.lfu, result.ours, result.belady)),
         "-" if result.gap_closed is None else f"{100 * result.gap_closed:.0f} %"]
        for result in results
    ]  # fmt: skip
    return table(("slots", "LRU", "LFU", "ours", "Belady", "LRU to Belady"), lines, left=0)
