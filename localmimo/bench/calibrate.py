"""Overhead: what the engine's own arithmetic costs on this machine, measured with the engine itself.

A layer's time beyond the bytes that it moves, on the embedded model, whose bytes take next to none; and how fast the
kernels run through a pack's own pages. Knows the engine and packs.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from localmimo.decode.sampler import Sampling
from localmimo.engine import load
from localmimo.errors import BadModel
from localmimo.experts.tiers.tiers import DiskTier, RamTier
from localmimo.hardware.bandwidth import Speeds, file_spots, keep, kept, measured_speeds, products_key
from localmimo.planning.footprint import Footprint, footprint_of
from quant import Pack
from quant.pack.pack import PageAt, experts_of

N_TOKENS = 24
N_RUNS = 2
BUDGET = "200MiB"  # every expert in memory
PRODUCTS_BYTES = 256 << 20  # of pages, far more than the caches hold
PRODUCTS_S = 0.5
CHILD = "import sys; from localmimo.bench.calibrate import main; main(sys.argv[1], int(sys.argv[2]))"


def layer_seconds(ram_read: float, *, anew: bool = False) -> float:
    """Seconds per layer and decode step beyond the bytes at `ram_read` bytes per second; kept for a week."""
    had = None if anew else kept("layer", "seconds")
    if had is None:
        had = {"seconds": _measure(ram_read)}
        keep("layer", had)
    return float(had["seconds"])


def _measure(ram_read: float) -> float:
    with load(context=512, ram=BUDGET, device="cpu", profile=None) as engine:
        model = footprint_of(engine.pack.path)
        speeds = []
        for _ in range(1 + N_RUNS):
            done = engine.generate("Once upon a time", max_tokens=N_TOKENS, sampling=Sampling(temperature=0))
            speeds.append(done.stats.decode_tps)
    token_s = 1 / median(speeds[1:])  # the first run reads its experts from disk
    return max(0.0, token_s - _bytes(model) / ram_read) / len(model.config.layers)


def _bytes(model: Footprint) -> int:
    return model.read_bytes + model.config.pages_per_token * model.page_bytes


# ---- products ----


def product_speed(pack: Pack, n_used: int) -> float:
    """Bytes of pages per second that the kernels run through for one token, `n_used` experts a layer; kept for a week.

    Pages come from the pack and lie in memory as the engine's do.
    """
    import torch

    from quant.ops.experts import experts

    assert pack.page is not None
    places = _some_pages(pack, n_used)
    memory = RamTier(len(places), pack.page.bytes)
    _read_into(memory, places)
    x, chosen = torch.randn(1, pack.page.hidden), torch.arange(n_used)
    spans = [edge for i in range(n_used) for edge in (i, i + 1)]
    weights, out = torch.ones(1, n_used), torch.empty(n_used, pack.page.hidden)
    groups = [range(i, i + n_used) for i in range(0, len(places) - n_used + 1, n_used)]
    experts(x, pack.page, [memory.tensor(i) for i in groups[0]], chosen, spans, weights, out)  # threads begin
    began, n_done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < PRODUCTS_S:
        pages = [memory.tensor(i) for i in groups[n_done % len(groups)]]
        experts(x, pack.page, pages, chosen, spans, weights, out)
        n_done += 1
    speed = n_done * n_used * pack.page.bytes / spent
    keep(products_key(pack.page.bytes), {"read": speed})
    return speed


def _some_pages(pack: Pack, least: int) -> list[PageAt]:
    """Pages of the pack's first codec from all over it, in no order: a token's lie nowhere near each other."""
    assert pack.page is not None
    pages = [pack.page_at(layer, expert) for layer, n in experts_of(pack).items() for expert in range(n)]
    pages = [page for page in pages if page.codec == pack.page.codec]
    random.Random(0).shuffle(pages)
    return pages[: max(least, PRODUCTS_BYTES // pack.page.bytes)]


def _read_into(memory: RamTier, pages: list[PageAt]) -> None:
    disk = DiskTier(trust=True)
    reads = [disk.read(page, memory.memory(slot)) for slot, page in enumerate(pages)]
    try:
        disk.wait(reads, None, every=True)
        for read in reads:
            read.result()
    finally:
        disk.close()


# ---- everything at once ----


def speeds_now(pack: Path, n_cores: int) -> Speeds:
    """All speeds that a plan for this pack wants, measured anew in a process of its own: nothing of it stays in memory.

    Raises BadModel where the measuring fails.
    """
    command = [sys.executable, "-c", CHILD, str(pack), str(n_cores)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadModel(f"The speed of this machine could not be measured: {last}")
    return Speeds(**json.loads(done.stdout.splitlines()[-1]))


def main(pack: str, n_cores: int) -> None:
    """The process of its own: prints the speeds as JSON."""
    model = footprint_of(pack)
    spots = file_spots(model.files, model.page_bytes)
    speeds = measured_speeds(spots, model.page_bytes, Path(pack), n_cores, anew=True)
    with Pack.open(pack) as opened:
        products = product_speed(opened, model.config.top_k)
    speeds = replace(speeds, products=products, layer_s=layer_seconds(speeds.ram_read, anew=True))
    print(json.dumps(asdict(speeds)))
