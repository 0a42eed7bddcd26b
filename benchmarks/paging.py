"""Does decode run at the speed of the disk when most experts lie there? And does a restart keep the warmth?

    python -m benchmarks.paging PACK [--share 0.5] [--tokens 96] [--json]

PACK should be random and bigger than the budget (`benchmarks.make_checkpoint --shape mid`, quantized). Tokens are drawn
at random, so that routing is as uniform as the router makes it: no policy can help much. In one process, in turn:

* `disk`: with slots for a share of the experts, bytes read per second while reading, against a probe that reads pages
  of the same pack in random order with the same number of threads and nothing else (`disk_fraction`), and wall time per
  token against the larger of bytes over probe speed and the compute time with every expert in RAM (`overlap_ratio`).
* `prefetch`: the same with and without guesses.
* `restart`: the speed of the first 64 tokens after the engine was closed and opened again, against the last 64 before.
* `bookkeeping` (only where named; on a pack of many small pages, `make_checkpoint --shape pages`: 12,032): what store
  and policy take per token where every page has a slot (benchmarks.policy: where not), and what a read costs the asking
  thread through our readers and through concurrent.futures.
* `same_tokens`: greedy tokens under both budgets, with and without guesses, and with slots revoked in mid-answer.
"""

import argparse
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write_result
from localmimo import Engine, load
from localmimo.decode.session import Session
from localmimo.experts.policy.adaptive import Adaptive
from localmimo.experts.policy.router_stats import RouterStats
from localmimo.experts.store.store import ExpertStore
from localmimo.experts.tiers.io_threads import IoThreads, Task
from localmimo.experts.tiers.tiers import DiskTier, RamTier
from localmimo.limits import N_READERS
from quant import Pack
from quant.pack.pack import experts_of

WARM_TOKENS = 24


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def probe_disk(pack: Pack, n_pages: int, seed: int) -> float:
    """Bytes per second of reading whole pages in random order, N_READERS at a time, and nothing else."""
    disk, ram = DiskTier(trust=True), RamTier(2 * N_READERS, pack.page.bytes)
    draw = random.Random(seed)
    pages = [(layer, expert) for layer, n in experts_of(pack).items() for expert in range(n)]
    flying: deque[Task] = deque()
    total = 0
    began = time.perf_counter()
    for i in range(n_pages):
        page = pack.page_at(*draw.choice(pages))
        if len(flying) == N_READERS:
            finish(disk, flying.popleft())
        flying.append(disk.read(page, ram.memory(i % (2 * N_READERS))))
        total += page.nbytes
    for read in flying:
        finish(disk, read)
    took = time.perf_counter() - began
    disk.close()
    return total / took


def finish(disk: DiskTier, read: Task) -> None:
    disk.wait([read], None)
    read.result()


def random_tokens(engine: Engine, n: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(engine.config.vocab_size) for _ in range(n)]


def steps(engine: Engine, session: Session, tokens: list[int]) -> dict[str, float]:
    """Feed tokens one by one; per token: seconds, bytes read; and the disk's speed while it was read."""
    before, began, times = engine._store.counters.copy(), time.perf_counter(), []
    for token in tokens:
        started = time.perf_counter()
        session.step(token)
        times.append(time.perf_counter() - started)
    wall, counters = time.perf_counter() - began, engine._store.counters.since(before)
    pages = counters.ram_pages + counters.disk_pages
    return {
        "token_s": wall / len(tokens),
        "median_s": statistics.median(times),
        "token_bytes": counters.disk_bytes / len(tokens),
        "disk_bps": counters.disk_bytes / counters.read_s if counters.read_s else 0.0,
        "busy_share": counters.read_s / wall,
        "hit_rate": counters.ram_pages / pages if pages else 1.0,
        "useful": counters.prefetch_useful / len(tokens),
        "wasted": counters.prefetch_wasted / len(tokens),
    }


@contextmanager
def opened(path: Path, ram: int | None, **options: Any) -> Iterator[tuple[Engine, Session]]:
    with load(path, ram=ram, context=1024, profile=options.pop("profile", None), **options) as engine:  # noqa: SIM117
        with engine.session() as session:
            yield engine, session


def budget_for(path: Path, share: float) -> int:
    """A RAM budget whose slots hold about this share of the experts."""
    with load(path, context=1024, profile=None) as engine:
        plan = engine.plan
        return plan.used_bytes - plan.slots_bytes + int(share * plan.n_pages) * plan.page_bytes


def resident_seconds(path: Path, n: int) -> float:
    """Compute time per token with every expert in RAM: the median over tokens whose experts have all been read."""
    with opened(path, None) as (engine, session):
        if engine.plan.n_slots < engine.plan.n_pages:
            raise SystemExit("The whole pack must fit in RAM to measure the compute time.")
        session.sync(random_tokens(engine, 700, 1))  # a prompt reads every expert
        steps(engine, session, random_tokens(engine, WARM_TOKENS, 2))
        return steps(engine, session, random_tokens(engine, n, 3))["median_s"]


def disk_bound(path: Path, ram: int, n: int, prefetch: bool) -> dict[str, float]:
    with opened(path, ram, prefetch=prefetch) as (engine, session):
        session.sync(random_tokens(engine, 8, 4))
        steps(engine, session, random_tokens(engine, WARM_TOKENS, 5))
        return steps(engine, session, random_tokens(engine, n, 6))


def restart(path: Path, ram: int, n: int) -> dict[str, float]:
    """Tokens per second before a restart, right after it, and once the hottest pages are back."""
    name = "benchmark-restart"
    with opened(path, ram, profile=name) as (engine, session):
        session.sync(random_tokens(engine, 8, 7))
        steps(engine, session, random_tokens(engine, n, 8))
        before = steps(engine, session, random_tokens(engine, 64, 9))["token_s"]
    with opened(path, ram, profile=name) as (engine, session):
        at_once = steps(engine, session, random_tokens(engine, 64, 10))["token_s"]
    with opened(path, ram, profile=name) as (engine, session):
        engine._store.wait_until_warm()
        warmed = steps(engine, session, random_tokens(engine, 64, 10))["token_s"]
    with opened(path, ram) as (engine, session):
        cold = steps(engine, session, random_tokens(engine, 64, 10))["token_s"]
    return {"at_once_ratio": at_once / before, "warmed_ratio": warmed / before, "cold_ratio": cold / before}


def greedy(path: Path, ram: int | None, prefetch: bool, revoke: bool) -> list[int]:
    with opened(path, ram, prefetch=prefetch) as (engine, session):
        logits, tokens = session.sync(random_tokens(engine, 40, 11)), []
        for i in range(24):
            if revoke and i % 8 == 4:
                engine._store.resize(engine.plan.n_slots // 2 if i % 16 == 4 else engine.plan.n_slots)
            tokens.append(int(logits.argmax()))
            logits = session.step(tokens[-1])
        return tokens


def bookkeeping(path: Path, n: int) -> dict[str, float]:
    """Milliseconds of the store and the policy per token, every page in RAM: the least and the median of n tokens."""
    with Pack.open(path) as pack:
        n_experts = experts_of(pack)
        stats = RouterStats(list(n_experts), max(n_experts.values()))
        store = ExpertStore(pack, pack.page.bytes, pack.n_pages, Adaptive(stats, room_for_all=True))
        store.warm([(layer, expert) for layer, k in n_experts.items() for expert in range(k)])
        store.wait_until_warm()
        draw, times = random.Random(12), []
        for _ in range(n):
            chosen = {layer: sorted(draw.sample(range(k), 8)) for layer, k in n_experts.items()}
            began = time.perf_counter()
            for layer, experts in chosen.items():
                for _arrivals in store.fetch(layer, experts):
                    pass
            times.append(1e3 * (time.perf_counter() - began))
        store.close()
    return {"n_pages": pack.n_pages, "least_ms": min(times), "median_ms": statistics.median(times)}


def microseconds_a_read(n: int) -> dict[str, float]:
    """What asking for eight reads and taking them as they come costs the asking thread, through either: medians."""
    readers, pool = IoThreads(N_READERS), ThreadPoolExecutor(N_READERS)
    times: dict[str, list[float]] = {"readers": [], "futures": []}
    for _ in range(n):
        times["readers"].append(_timed(lambda: _take_all([readers.demand(_job) for _ in range(8)], readers)))
        times["futures"].append(_timed(lambda: _take_futures({pool.submit(_job) for _ in range(8)})))
    readers.close()
    pool.shutdown()
    return {name: 1e6 / 8 * statistics.median(taken) for name, taken in times.items()}


def _job() -> None:
    """As long as a read of a page takes, and as little of the processor."""
    time.sleep(0.002)


def _timed(work: Callable[[], None]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def _take_all(tasks: list[Task], readers: IoThreads) -> None:
    while tasks:
        readers.wait(tasks, None)
        tasks = [task for task in tasks if not task.done()]


def _take_futures(tasks: set[Future[None]]) -> None:
    while tasks:
        _, tasks = wait(tasks, return_when=FIRST_COMPLETED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the experts that have a slot")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--only", default="disk,prefetch,restart,same", help="parts to run")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args()
    pack, parts = Pack.open(options.pack), options.only.split(",")
    found: dict[str, Any] = {
        "pack": pack.name, "page_bytes": pack.page.bytes, "n_pages": pack.n_pages, "share": options.share,
        "readers": N_READERS, "torch_threads": torch.get_num_threads(),
    }  # fmt: skip
    if "bookkeeping" in parts:
        found["bookkeeping"] = bookkeeping(options.pack, options.tokens)
        found["read_us"] = microseconds_a_read(200)
    if parts != ["bookkeeping"]:
        ram = budget_for(options.pack, options.share)
    if "disk" in parts or "prefetch" in parts:
        found |= disk_part(options.pack, pack, ram, options.tokens, "prefetch" in parts)
    if "restart" in parts:
        found["restart"] = restart(options.pack, ram, options.tokens)
        say(f"restart {found['restart']}")
    if "same" in parts:
        runs = [(None, True, False), (ram, True, False), (ram, False, False), (ram, True, True)]
        answers = {tuple(greedy(options.pack, *run)) for run in runs}
        found["same_tokens"] = len(answers) == 1
    write_result("paging", found)


def disk_part(path: Path, pack: Pack, ram: int, n: int, compare: bool) -> dict[str, Any]:
    """Probe, run, probe: the disk of a shared machine is not the same for long."""
    compute = resident_seconds(path, n)
    probes, runs = [probe_disk(pack, 300, 1)], {}
    for prefetch in (True, False) if compare else (True,):
        runs[prefetch] = disk_bound(path, ram, n, prefetch)
        probes.append(probe_disk(pack, 300, 2 + prefetch))
        say(f"prefetch {prefetch}: {runs[prefetch]}")
    speed, run = statistics.mean(probes), runs[True]
    found: dict[str, Any] = {
        "probe_bps": probes, "compute_s": compute, "disk": run, "disk_fraction": run["disk_bps"] / speed,
        "overlap_ratio": run["token_s"] / max(run["token_bytes"] / speed, compute),
    }  # fmt: skip
    if compare:
        without = runs[False]
        found |= {
            "without_prefetch": without,
            "without_overlap_ratio": without["token_s"] / max(without["token_bytes"] / speed, compute),
            "prefetch_speedup": without["token_s"] / run["token_s"],
        }
    return found


if __name__ == "__main__":
    main()
