"""Overhead: what a layer costs beyond the bytes that it moves, measured on the embedded model.

That model's bytes take next to no time, so nearly all of its time per token is what the engine adds. Knows the engine.
"""

from __future__ import annotations

from statistics import median

from localmimo.engine import load
from localmimo.sample import Sampling
from localmimo.speeds import keep, kept
from localmimo.structure import Structure, structure_of

N_TOKENS = 24
N_RUNS = 2
BUDGET = "200MiB"  # every expert in memory


def layer_seconds(ram_read: float, *, anew: bool = False) -> float:
    """Seconds per layer and decode step beyond the bytes at `ram_read` bytes per second; kept for a week."""
    had = None if anew else kept("layer", "seconds")
    if had is None:
        had = {"seconds": _measure(ram_read)}
        keep("layer", had)
    return float(had["seconds"])


def _measure(ram_read: float) -> float:
    with load(context=512, ram=BUDGET, device="cpu", profile=None) as engine:
        model = structure_of(engine.pack.path)
        speeds = []
        for _ in range(1 + N_RUNS):
            done = engine.generate("Once upon a time", max_tokens=N_TOKENS, sampling=Sampling(temperature=0))
            speeds.append(done.stats.decode_tps)
    token_s = 1 / median(speeds[1:])  # the first run reads its experts from disk
    return max(0.0, token_s - _bytes(model) / ram_read) / len(model.config.layers)


def _bytes(model: Structure) -> int:
    return model.read_bytes + model.config.pages_per_token * model.page_bytes
