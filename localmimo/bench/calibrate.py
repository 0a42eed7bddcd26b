"""Calibration: the speeds of this machine that a plan needs, measured with the engine and its kernels.

Two are measured. The first is a layer's seconds beyond the bytes that it reads, on the embedded model, whose bytes
take almost no time. The second is how fast the kernels read a pack's own pages. Knows the engine and packs.
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

from localmimo.decode.options import Sampling
from localmimo.engine import load
from localmimo.errors import BadModel
from localmimo.experts.tiers.tiers import DiskTier, RamTier
from localmimo.hardware.bandwidth import Speeds, file_spots, measured_speeds, products_key
from localmimo.hardware.measurements import keep, kept
from localmimo.planning.footprint import Footprint, footprint_of
from quant import Pack
from quant.pack.pack import PageAt, experts_of

N_TOKENS = 24
N_RUNS = 2
RAM_BUDGET = "200MiB"  # for every expert of the embedded model
PRODUCTS_BYTES = 256 << 20  # of pages, far more than the processor's caches hold
PRODUCTS_S = 0.5
_PROGRAM = "import sys; from localmimo.bench.calibrate import main; main(sys.argv[1], int(sys.argv[2]))"


def layer_seconds(ram_read: float, *, anew: bool = False) -> float:
    """Seconds per layer and token beyond its bytes at `ram_read` bytes per second. Measured once a week, or `anew`."""
    measured = None if anew else kept("layer", "seconds")
    if measured is None:
        measured = {"seconds": _measure_layer(ram_read)}
        keep("layer", measured)
    return float(measured["seconds"])


def _measure_layer(ram_read: float) -> float:
    with load(context=512, ram=RAM_BUDGET, device="cpu", profile=None) as engine:
        model = footprint_of(engine.pack.path)
        decode_tps = []
        for _ in range(1 + N_RUNS):
            greedy = Sampling(temperature=0)
            answer = engine.generate("Once upon a time", max_tokens=N_TOKENS, sampling=greedy)
            decode_tps.append(answer.stats.decode_tps)
    token_s = 1 / median(decode_tps[1:])  # the first run reads its experts from disk
    return max(0.0, token_s - _token_bytes(model) / ram_read) / len(model.config.layers)


def _token_bytes(model: Footprint) -> int:
    """Bytes of weights that one token reads."""
    return model.read_bytes + model.config.pages_per_token * model.page_bytes


# ---- products of a pack's pages ----


def product_speed(pack: Pack, n_used: int) -> float:
    """Bytes of pages per second that the kernels go through for one token, with `n_used` experts a layer.

    The pages are the pack's, in memory of the kind that the engine uses. Every call measures, and keeps the result.
    """
    import torch

    from quant.ops.experts import experts

    assert pack.page is not None
    pages = _some_pages(pack, n_used)
    memory = RamTier(len(pages), pack.page.bytes)
    _read_into(memory, pages)
    x, chosen = torch.randn(1, pack.page.hidden), torch.arange(n_used)
    spans = [edge for i in range(n_used) for edge in (i, i + 1)]
    weights, out = torch.ones(1, n_used), torch.empty(n_used, pack.page.hidden)
    groups = [range(i, i + n_used) for i in range(0, len(pages) - n_used + 1, n_used)]
    experts(
        x, pack.page, [memory.tensor(i) for i in groups[0]], chosen, spans, weights, out
    )  # starts the threads
    start_s, n_done = time.perf_counter(), 0
    while (spent_s := time.perf_counter() - start_s) < PRODUCTS_S:
        group = [memory.tensor(i) for i in groups[n_done % len(groups)]]
        experts(x, pack.page, group, chosen, spans, weights, out)
        n_done += 1
    speed = n_done * n_used * pack.page.bytes / spent_s
    keep(products_key(pack.page.bytes), {"read": speed})
    return speed


def _some_pages(pack: Pack, n_min: int) -> list[PageAt]:
    """Pages of the pack's first codec in random order: the pages of one token are not beside each other either."""
    assert pack.page is not None
    pages = [pack.page_at(layer, expert) for layer, n in experts_of(pack).items() for expert in range(n)]
    pages = [page for page in pages if page.codec == pack.page.codec]
    random.Random(0).shuffle(pages)
    return pages[: max(n_min, PRODUCTS_BYTES // pack.page.bytes)]


def _read_into(memory: RamTier, pages: list[PageAt]) -> None:
    disk = DiskTier(trust=True)
    reads = [disk.read(page, memory.memory(slot)) for slot, page in enumerate(pages)]
    try:
        disk.wait(reads, None, every=True)
        for read in reads:
            read.result()
    finally:
        disk.close()


# ---- all speeds ----


def speeds_now(pack: Path, n_cores: int) -> Speeds:
    """All speeds that a plan for this pack needs, measured now, in a process whose memory ends with it.

    Raises BadModel where the measurement fails.
    """
    command = [sys.executable, "-c", _PROGRAM, str(pack), str(n_cores)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadModel(f"The speed of this machine could not be measured: {last}")
    return Speeds(**json.loads(done.stdout.splitlines()[-1]))


def main(pack: str, n_cores: int) -> None:
    """The program of `speeds_now`: prints the speeds as JSON."""
    model = footprint_of(pack)
    spots = file_spots(model.files, model.page_bytes)
    speeds = measured_speeds(spots, model.page_bytes, Path(pack), n_cores, anew=True)
    with Pack.open(pack) as opened:
        products = product_speed(opened, model.config.top_k)
    speeds = replace(speeds, products=products, layer_s=layer_seconds(speeds.ram_read, anew=True))
    print(json.dumps(asdict(speeds)))
