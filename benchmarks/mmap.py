"""Decode of a model twice the memory: ours against llama.cpp's mmap, under the same cap, in one run.

    python -m benchmarks.mmap PACK RIVAL.gguf --rival-python VENV/bin/python --cap 2650MB [--tokens 48]

PACK and RIVAL are random models of one shape (`benchmarks.make_checkpoint`, `benchmarks.random_gguf`). Every arm is a
process in a memory control group of its own, so that its page cache counts against the cap as its heap does; the page
cache is dropped before each arm. The arms take turns, `--rounds` times: ours; llama.cpp with the disk's read-ahead as
it comes; llama.cpp with 128 KB, its best here. All feed the same tokens one by one: drawn evenly (`uniform`), and by
Zipf's law with exponent 1.1, as words come (`zipf`), which skews the routing. Needs root: control groups and the
disk's read-ahead setting.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import write_result
from localmimo.hardware.units import parse_bytes

GROUPS = Path("/sys/fs/cgroup/memory")
LIBRARIES = 450 << 20  # interpreter, torch and its pools: in the cap, outside our --ram

OURS = """
import json, resource, sys, time
from localmimo import load
pack, ram, tokens, warm = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
with load(pack, ram=ram, context=1024, profile=None) as engine, engine.session() as session:
    session.sync(tokens[:8])
    for token in tokens[8 : 8 + warm]:
        session.step(token)
    before, began = engine._store.counters.copy(), time.perf_counter()
    for token in tokens[8 + warm :]:
        session.step(token)
    wall, traffic = time.perf_counter() - began, engine._store.counters.since(before)
    n = len(tokens) - 8 - warm
    pages = traffic.ram_pages + traffic.disk_pages
    print(json.dumps({"tps": n / wall, "token_bytes": traffic.disk_bytes / n, "hit_rate": traffic.ram_pages / pages,
                      "disk_bps": traffic.disk_bytes / max(1e-9, traffic.read_s), "slots": engine.plan.n_slots,
                      "prefetch": [traffic.prefetch_useful, traffic.prefetch_wasted]}))
"""

THEIRS = """
import json, os, sys, time
from llama_cpp import Llama, llama_cpp
defaults = llama_cpp.llama_model_default_params
def as_on_disk():  # repacked weights would be a copy of the model in memory
    params = defaults()
    params.use_extra_bufts = False
    return params
llama_cpp.llama_model_default_params = as_on_disk
def read_bytes():
    return int(next(line for line in open("/proc/self/io") if line.startswith("read_bytes")).split()[1])
model, tokens, warm, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
llama = Llama(model, n_ctx=1024, n_batch=64, n_threads=threads, use_mmap=True, verbose=False)
llama.eval(tokens[:8])
for token in tokens[8 : 8 + warm]:
    llama.eval([token])
before, began = read_bytes(), time.perf_counter()
for token in tokens[8 + warm :]:
    llama.eval([token])
wall, n = time.perf_counter() - began, len(tokens) - 8 - warm
print(json.dumps({"tps": n / wall, "token_bytes": (read_bytes() - before) / n}))
"""


@contextmanager
def capped(cap: int) -> Iterator[Path]:
    """A control group with so much memory, page cache included."""
    group = GROUPS / f"localmimo-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(cap))
        yield group
    finally:
        group.rmdir()


@contextmanager
def read_ahead(disk: str, kilobytes: int | None) -> Iterator[None]:
    """The disk's read-ahead, set for a while; None leaves it."""
    setting = Path(f"/sys/block/{disk}/queue/read_ahead_kb")
    before = setting.read_text()
    try:
        if kilobytes is not None:
            setting.write_text(str(kilobytes))
        yield
    finally:
        setting.write_text(before)


def run(cap: int, command: list[str]) -> dict[str, Any]:
    """Run a command in a capped group, the page cache dropped before; its last line of JSON."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")
    with capped(cap) as group:
        done = subprocess.run(
            ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *command],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"An arm failed ({done.returncode}): {command[:2]} {done.stderr[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])


def draw(kind: str, n: int, vocab: int, seed: int) -> list[int]:
    source = random.Random(seed)
    if kind == "uniform":
        return [source.randrange(vocab) for _ in range(n)]
    order = source.sample(range(vocab), vocab)
    return source.choices(order, [1 / (rank + 1) ** 1.1 for rank in range(vocab)], k=n)


def compare(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """All arms in turn; the median speed of each."""
    cap, vocab = (
        parse_bytes(options.cap),
        json.loads((options.pack / "config.json").read_text())["vocab_size"],
    )
    arms: dict[str, list[dict[str, Any]]] = {"ours": [], "mmap_128k": [], "mmap_as_it_comes": []}
    for turn in range(options.rounds):
        tokens = json.dumps(draw(kind, 8 + options.warm + options.tokens, vocab, turn))
        ours = [
            sys.executable,
            "-c",
            OURS,
            str(options.pack),
            str(cap - LIBRARIES),
            tokens,
            str(options.warm),
        ]
        theirs = [options.rival_python, "-c", THEIRS, str(options.rival)]
        arms["ours"].append(run(cap, ours))
        with read_ahead(options.disk, 128):
            arms["mmap_128k"].append(run(cap, [*theirs, tokens, str(options.warm), "2"]))
        few = json.dumps(json.loads(tokens)[: 8 + 4 + max(8, options.tokens // 4)])  # it is so slow
        arms["mmap_as_it_comes"].append(run(cap, [*theirs, few, "4", "2"]))
        print({name: runs[-1] for name, runs in arms.items()}, file=sys.stderr, flush=True)
    speed = {name: statistics.median(arm["tps"] for arm in runs) for name, runs in arms.items()}
    return {
        "tps": speed,
        "versus_128k": speed["ours"] / speed["mmap_128k"],
        "versus_as_it_comes": speed["ours"] / speed["mmap_as_it_comes"],
        "runs": arms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", type=Path)
    parser.add_argument("rival", type=Path)
    parser.add_argument("--rival-python", required=True, help="of an environment with llama-cpp-python")
    parser.add_argument("--cap", required=True, help="memory of each arm, page cache included: 2650MB")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--warm", type=int, default=24, help="tokens before the clock starts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--disk", default="vda", help="block device, for its read-ahead")
    parser.add_argument("--kinds", default="uniform,zipf")
    options = parser.parse_args()
    found = {kind: compare(options, kind) for kind in options.kinds.split(",")}
    write_result(
        "mmap", {"cap": options.cap, "pack": str(options.pack.name), "rival": options.rival.name} | found
    )


if __name__ == "__main__":
    main()
