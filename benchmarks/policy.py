"""How much of the way from LRU to Belady does our policy go, and what does its bookkeeping cost?

    python -m benchmarks.policy [--recorded DIR] [--seed 1000] [--cost-only] [--json]

Plays recorded traces (of `benchmarks.record_traces --split report`; recorded into DIR first if it has none) and
synthetic ones through `localmimo replay`'s code, with slots for 1.2 to 5 token cycles. `closed` is (ours - LRU) /
(Belady - LRU), `points` is ours - LRU in per cent of the requests. Cost: for 47 layers of 256 experts, 8 a token.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import routing
from benchmarks.record_traces import record
from benchmarks.report import write_result
from benchmarks.routing import Language, Shape, trace_of
from localmimo.experts.policy.baselines import Adaptive, Page
from localmimo.experts.policy.replay import replay
from localmimo.experts.policy.router_stats import RouterStats
from localmimo.experts.policy.trace import Trace, read_trace

CYCLES = (1.2, 1.7, 2.5, 3.5, 5.0)
TARGETS = {1.2: 0.4, 1.7: 0.4, 2.5: 0.4, 3.5: 0.3, 5.0: 0.3}


def synthetic(seed: int) -> Iterator[tuple[str, Trace]]:
    plain = Shape()
    for skew in (0.0, 0.7, 1.2):
        yield f"zipf {skew}", trace_of(routing.zipf(seed, plain, skew))
    yield "zipf 1.2, drifting", trace_of(routing.zipf(seed + 1, plain, 1.2, drift=30))
    yield "two conversations", trace_of(routing.alternating(seed + 2, plain, 40))
    yield "periodic", trace_of(routing.periodic(seed + 3, plain, 5, 0.1))
    yield "periodic, noisy", trace_of(routing.periodic(seed + 4, plain, 12, 0.4))
    yield "scans", trace_of(routing.scans(seed + 5, plain, 40, 12))
    small = Shape(n_layers=8, n_experts=32, n_tokens=120)
    for every in (6, 12, 24):
        yield f"fickle, {every} tokens", trace_of(routing.fickle(seed + 9, small, 0.95, every))
    large = Shape(n_layers=24, n_experts=128, n_tokens=96)
    wide = Shape(n_layers=20, n_experts=128, top_k=8, n_tokens=96)
    yield "language", trace_of(routing.language(seed + 6, large, Language()))
    yield (
        "language, 8 of 128",
        trace_of(routing.language(seed + 7, wide, Language(topic_tokens=20, n_topics=8))),
    )
    restless = Language(topic=1.0, token=1.0, walk=1.2, skew=0.1, topic_tokens=8, n_topics=12)
    yield "language, restless", trace_of(routing.language(seed + 8, wide, restless))


def recorded(folder: Path, n_tokens: int = 400) -> Iterator[tuple[str, Trace]]:
    paths = sorted(folder.glob("report-*.jsonl")) or record(folder, "report", n_tokens)
    for path in paths:
        yield path.stem.replace("report-", "mini: "), read_trace(path)


def measure(name: str, trace: Trace) -> dict[str, Any]:
    """One trace at every number of slots."""
    cycle = trace.n_requests / trace.n_steps
    runs = {cycles: replay(trace, round(cycles * cycle)) for cycles in CYCLES}
    return {
        "trace": name,
        "slots": [run.slots for run in runs.values()],
        "lru": [round(run.lru, 4) for run in runs.values()],
        "belady": [round(run.belady, 4) for run in runs.values()],
        "lfu_closed": [_closed(run.lfu, run.lru, run.belady) for run in runs.values()],
        "closed": [_closed(run.ours, run.lru, run.belady) for run in runs.values()],
        "points": [round(100 * (run.ours - run.lru), 2) for run in runs.values()],
    }


def _closed(rate: float, lru: float, belady: float) -> float | None:
    """None where there is no gap worth speaking of."""
    return round((rate - lru) / (belady - lru), 3) if belady - lru > 0.005 else None


def cost(n_tokens: int = 120) -> list[dict[str, float]]:
    """Milliseconds per token of request, victims, drop and admit; the cache is full after the first tokens."""
    shape = Shape(n_layers=47, n_experts=256, top_k=8, n_tokens=n_tokens)
    lines = list(trace_of(routing.zipf(5, shape, 1.0)))
    return [_cost(lines, slots, shape) for slots in (940, 1880, 6016)]


def _cost(lines: list[tuple[int, list[int]]], slots: int, shape: Shape) -> dict[str, float]:
    policy, held = Adaptive(RouterStats(range(shape.n_layers), shape.n_experts)), set[Page]()
    spent = [0.0]
    for layer, experts in lines:
        wanted = [(layer, expert) for expert in experts]
        missing = [page for page in wanted if page not in held]
        began = time.perf_counter()
        policy.request(layer, experts)
        going = policy.victims(len(missing), wanted) if len(held) + len(missing) > slots else []
        for page in going:
            policy.drop(page)
        for page in missing:
            policy.admit(page)
        spent[-1] += time.perf_counter() - began
        held = (held - set(going)) | set(missing)
        if layer == shape.n_layers - 1:
            spent.append(0.0)
    late = np.array(spent[len(spent) // 3 : -1]) * 1e3
    return {"slots": slots, "ms_per_token": float(np.median(late)), "ms_p90": float(np.quantile(late, 0.9))}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    closed = np.array([[np.nan if x is None else x for x in run["closed"]] for run in runs])
    return {
        "cycles": CYCLES,
        "targets": list(TARGETS.values()),
        "mean_closed": np.round(np.nanmean(closed, 0), 3).tolist(),
        "worst_closed": np.round(np.nanmin(closed, 0), 3).tolist(),
        "worst_points": min(min(run["points"]) for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recorded", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--cost-only", action="store_true")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if not options.cost_only:
        with tempfile.TemporaryDirectory() as folder:
            groups = {
                "recorded": recorded(options.recorded or Path(folder)),
                "synthetic": synthetic(options.seed),
            }
            for group, traces in groups.items():
                runs = []
                for name, trace in traces:
                    runs.append(measure(name, trace))
                    if not options.json:
                        print(
                            f"{name:22} closed {runs[-1]['closed']}  points {runs[-1]['points']}", flush=True
                        )
                result[group] = {"traces": runs, **summary(runs)}
    result["cost"] = cost()
    write_result("policy", result)


if __name__ == "__main__":
    main()
